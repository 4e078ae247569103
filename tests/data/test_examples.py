"""Rows become examples: what the loss counts, what is cut, split and packed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from quantcli.data.examples import IGNORED, collate, pack, read_examples
from quantcli.errors import InputError, UsageError
from quantcli.options import ExampleOptions
from quantcli.progress import Silent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def rows(path, values):
    path.write_text("\n".join(json.dumps(value) for value in values))
    return str(path)


def read(tokenizer, *files, seed=0, progress=None, **given):
    return read_examples(ExampleOptions(files, **given), tokenizer, seed, progress or Silent())


PAIRS = [{"q": f"w{i} w{i + 1}", "a": f"w{i + 2}"} for i in range(20)]


def test_the_loss_counts_completion_and_end_or_everything(tokenizer, tmp_path):
    file = rows(tmp_path / "a.jsonl", PAIRS)
    only = read(tokenizer, file, text_template="{q} w9 {a} w8", completion_only=True).train[0]
    whole = read(tokenizer, file, text_template="{q} w9 {a} w8").train[0]
    assert only.tokens == whole.tokens == [2, 3, 11, 4, 10, 1]
    assert only.labels == [IGNORED] * 3 + [4, 10, 1]
    assert whole.labels == whole.tokens
    assert only.answer == whole.answer == (3, 5)


def test_tsv_and_escapes(tokenizer, tmp_path):
    (tmp_path / "a.tsv").write_text("q\ta\n" + "\n".join(f"{p['q']}\t{p['a']}" for p in PAIRS))
    from_tsv = read(tokenizer, str(tmp_path / "a.tsv"), text_template=r"{q}\n{a}")
    from_jsonl = read(tokenizer, rows(tmp_path / "a.jsonl", PAIRS), text_template="{q}\n{a}")
    assert from_tsv.train == from_jsonl.train


def test_several_files_one_after_the_other(tokenizer, tmp_path):
    files = rows(tmp_path / "a.jsonl", PAIRS[:10]), rows(tmp_path / "b.jsonl", PAIRS[10:])
    sets = read(tokenizer, *files, text_template="{q} {a}")
    assert sets.train == read(tokenizer, rows(tmp_path / "c.jsonl", PAIRS), text_template="{q} {a}").train


@pytest.mark.parametrize(("split", "count"), [("0.1", 2), ("0.001", 1), ("5", 5)])
def test_share_or_number_is_held_out(tokenizer, tmp_path, split, count):
    sets = read(tokenizer, rows(tmp_path / "a.jsonl", PAIRS), text_template="{q} {a}", eval_split=split)
    assert (len(sets.train), len(sets.eval)) == (20 - count, count)
    assert not [e for e in sets.eval if e in sets.train]


def test_a_file_is_held_out(tokenizer, tmp_path):
    other = rows(tmp_path / "b.jsonl", PAIRS[:3])
    sets = read(tokenizer, rows(tmp_path / "a.jsonl", PAIRS), text_template="{q} {a}", eval_split=other)
    assert (len(sets.train), len(sets.eval)) == (20, 3)


def test_a_long_text_is_cut_into_pieces_and_nothing_lost(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(tiny.words(100))
    sets = read(tokenizer, str(tmp_path / "a.txt"), seq_len=16, eval_split="1")
    tokens = sorted(t for e in (*sets.train, *sets.eval) for t in e.tokens)
    assert tokens == sorted([*tokenizer(tiny.words(100))["input_ids"], tokenizer.eos_token_id])


def test_what_is_missing_is_said(tokenizer, tmp_path):
    values = [*PAIRS, {"q": "w1", "a": ""}, {"q": tiny.words(6), "a": tiny.words(9)}, {"q": tiny.words(40), "a": "w1"}]
    told, name = tiny.Warnings(), tmp_path / "a.jsonl"
    sets = read(
        tokenizer,
        rows(name, values),
        text_template="{q} {a}",
        seq_len=10,
        max_samples=50,
        progress=told,
    )
    assert len(sets.train) + len(sets.eval) == 21
    assert told.said == [
        f"{name} holds 23 rows, --max-samples asked for 50",
        f"{name}: 1 of 23 rows hold nothing and were left out",
        f"{name}: 1 of 23 rows were cut at 10 tokens: --seq-len takes more",
        f"{name}: 1 of 23 rows have a prompt of 10 tokens or more and were left out: --seq-len takes more",
    ]


def test_what_is_missing_is_said_of_each_file(tokenizer, tmp_path):
    held = rows(tmp_path / "b.jsonl", [{"q": "w1", "a": "w2"}, {"q": "w1", "a": " "}])
    told = tiny.Warnings()
    file = rows(tmp_path / "a.jsonl", PAIRS)
    sets = read(tokenizer, file, text_template="{q} {a}", eval_split=held, max_samples=20, progress=told)
    assert (len(sets.train), len(sets.eval)) == (20, 1)
    assert told.said == [f"{held}: 1 of 2 rows hold nothing and were left out"]


def test_a_data_name_that_is_a_file(tokenizer, tmp_path):
    file = rows(tmp_path / "a.jsonl", PAIRS)
    named = read_examples(ExampleOptions(data_name=file, text_template="{q} {a}"), tokenizer, 0, Silent())
    given = read_examples(ExampleOptions((file,), text_template="{q} {a}"), tokenizer, 0, Silent())
    assert (named.train, named.eval) == (given.train, given.eval)


def test_chat(tokenizer, tmp_path):
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    file = rows(tmp_path / "a.jsonl", [{"messages": turns}] * 3)
    with pytest.raises(InputError, match="the model has no chat template"):
        read(tokenizer, file, use_chat_template=True)
    chat = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chat.chat_template = (
        "{% for m in messages %}{{ 'w7 ' if m['role'] == 'user' else 'w8 ' }}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w8 {% endif %}"
    )
    example = read(chat, file, use_chat_template=True, completion_only=True).train[0]
    assert example.tokens == [9, 3, 4, 10, 5]
    assert example.labels == [IGNORED] * 4 + [5]


def test_nothing_before_the_only_field(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="nothing before its last field"):
        read(tokenizer, rows(tmp_path / "a.jsonl", PAIRS), text_template="{a}", completion_only=True)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_a_packed_row_has_the_loss_of_its_examples(tokenizer, tmp_path, model_type):
    folder = tiny.checkpoint(tmp_path / "model", model_type)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    examples = read(tokenizer, rows(tmp_path / "a.jsonl", PAIRS), text_template="{q} {a}", completion_only=True).train
    packed = pack(examples, 24)
    assert [e for row in packed for e in row] == examples
    assert all(sum(len(e.tokens) for e in row) <= 24 for row in packed)
    assert max(map(len, packed)) > 1
    with torch.no_grad():
        together = model(**collate(packed, 0), use_cache=False).loss
        alone = model(**collate([[e] for e in examples], 0), use_cache=False).loss
    assert abs(together - alone) < 1e-5 * alone
