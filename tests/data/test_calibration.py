import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from quantcli.data.calibration import calibration_rows, load_tokenizer
from quantcli.data.windows import bos_prefix, cut_rows, evaluation_windows, joined_tokens
from quantcli.errors import InputError
from quantcli.options import CalibrationOptions
from quantcli.progress import Silent

WORDS = 200


class _Warnings(Silent):
    def __init__(self):
        self.said = []

    def warn(self, message):
        self.said.append(message)


def make_tokenizer(bos=False):
    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTCLI_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 2, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    path = tmp_path / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    make_tokenizer(bos=True).save_pretrained(path)
    return path


def rows_of(folder, progress=None, **options):
    options = CalibrationOptions(**{"num_samples": 4, "seq_len": 8} | options)
    return calibration_rows(options, folder, model_digest="d", progress=progress or Silent())


def words(count, start=0):
    return " ".join(f"w{(start + i) % WORDS}" for i in range(count))


def test_documents_are_joined_by_an_end_token():
    line = joined_tokens(make_tokenizer(bos=True), ["w0 w1", "w2"])
    assert line.tolist() == [2, 3, 1, 4]


def test_cut_rows_are_disjoint_spread_and_prefixed():
    line = torch.arange(1000)
    rows = cut_rows(line, 10, 11, [7], None)
    assert rows.shape == (10, 11) and set(rows[:, 0].tolist()) == {7}
    starts = rows[:, 1]
    assert torch.equal(rows[:, 1:], starts[:, None] + torch.arange(10))
    # one row from every tenth of the text
    assert (starts // 100).tolist() == list(range(10))


def test_random_rows_come_from_every_stretch_and_follow_the_seed():
    line = torch.arange(1000)

    def cut(seed):
        return cut_rows(line, 10, 10, [], torch.Generator().manual_seed(seed))

    assert sorted((cut(0)[:, 0] // 100).tolist()) == list(range(10))
    assert torch.equal(cut(0), cut(0)) and not torch.equal(cut(0), cut(1))


def test_bos_prefix_is_there_only_where_the_tokenizer_adds_it():
    assert bos_prefix(make_tokenizer(bos=True)) == [0]
    assert bos_prefix(make_tokenizer()) == []


def test_evaluation_windows():
    windows = evaluation_windows(make_tokenizer(), [words(100)], 3, 20)
    assert windows.shape == (3, 20) and windows.dtype == torch.int64
    assert len({tuple(w) for w in windows.tolist()}) == 3
    with pytest.raises(InputError, match="holds 5 tokens, fewer than one window of 20"):
        evaluation_windows(make_tokenizer(), [words(5)], 3, 20)


def test_rows_of_a_file(folder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": words(40, start=i)}) + "\n" for i in range(5)))
    got = rows_of(folder, data=str(path))
    assert got.tokens.shape == (4, 8) and got.tokens.dtype == torch.int64
    assert set(got.tokens[:, 0].tolist()) == {0}
    assert (got.source, got.shortfall) == (str(path), 0)
    assert torch.equal(got.tokens, rows_of(folder, data=str(path)).tokens)
    assert not torch.equal(got.tokens, rows_of(folder, data=str(path), seed=1).tokens)


def test_text_far_beyond_the_need_is_drawn_from_all_over(folder, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" ".join(f"w{i * WORDS // 40_000}" for i in range(40_000)))
    tokens = rows_of(folder, data=str(path), num_samples=16).tokens[:, 1:]
    # rows from the early, middle and late words of one long document
    assert tokens.min() < 60 and tokens.max() > 140
    assert len(tokens[:, 0].unique()) > 6


def test_shortfall_is_said_with_the_remedy(folder, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(words(21))
    progress = _Warnings()
    got = rows_of(folder, progress, data=str(path))
    assert got.tokens.shape == (3, 8) and got.shortfall == 1
    assert "gives 3 rows of 8 tokens, 4 were asked for" in progress.said[0]
    assert "--num-samples 3" in progress.said[0]


def test_less_than_one_row_is_refused(folder, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(words(3))
    with pytest.raises(InputError, match="holds 3 tokens, fewer than one row of 8"):
        rows_of(folder, data=str(path))


def test_builtin(folder):
    got = rows_of(folder, data="builtin")
    assert got.source == "Python's own documentation" and got.tokens.shape == (4, 8)


def test_self_is_the_default_and_is_cached(folder, tmp_path):
    got = rows_of(folder)
    assert got.source == "text that the model wrote itself"
    assert got.tokens.shape == (4, 8) and set(got.tokens[:, 0].tolist()) == {0}
    (folder / "model.safetensors").unlink()  # the second time needs no model
    assert torch.equal(rows_of(folder).tokens, got.tokens)


def test_source_decides_where_the_options_do_not(folder):
    options = CalibrationOptions(num_samples=4, seq_len=8)
    got = calibration_rows(options, folder, source="builtin", model_digest="d", progress=Silent())
    assert got.source == "Python's own documentation"


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(InputError, match="has no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
