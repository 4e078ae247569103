"""Completions that are labels, and prompts with each of them."""

import pytest
from transformers import AutoTokenizer

import tiny
from quantcli.data.examples import ExampleReader, ExampleSets
from quantcli.data.labels import find_labels, read_questions
from quantcli.options import ExampleOptions

OPTIONS = ExampleOptions(("none",), text_template="{q} w9 {a} w8", seq_len=8)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return ExampleReader(OPTIONS, AutoTokenizer.from_pretrained(folder))


def examples(reader, answers):
    return reader.read((f"row {i}", {"q": f"w{i} w3", "a": answer}) for i, answer in enumerate(answers))


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        (["w5", "w6", "w6", "w5", "w6", "w6", "w5", "w6"], ["w6 w8", "w5 w8"]),
        (["w5", "w6", "w6", "w5", "w6", "w6", "w5"], []),  # too few rows for each
        (["w5"] * 20, []),
        ([f"w{i % 11}" for i in range(100)], []),
    ],
)
def test_labels_are_few_and_frequent(reader, answers, labels):
    found = examples(reader, answers)
    assert find_labels(ExampleSets(found[:-2], found[-2:], "")) == labels


def test_plain_text_has_no_labels(reader):
    options = ExampleOptions(("none",))
    found = ExampleReader(options, reader.tokenizer).read(("row", {"text": "w1 w2"}) for _ in range(20))
    assert find_labels(ExampleSets(found, found, "")) == []


def test_a_question_is_the_prompt_with_every_label(reader):
    found = examples(reader, ["w6", "w5"])
    first, second = read_questions(found, ["w5 w8", "w6 w8"], OPTIONS, reader.tokenizer)
    assert [a.tokens for a in first.answers] == [[2, 5, 11, 7, 10, 1], [2, 5, 11, 8, 10, 1]]
    assert (first.right, first.begin, second.right) == (1, 3, 0)
    assert first.answers[1] == found[0]


def test_questions_that_are_too_long_for_one_label_are_left_out(reader):
    found = examples(reader, ["w5"])
    assert read_questions(found, ["w5 w8", "w6 w8 w8 w8 w8"], OPTIONS, reader.tokenizer) == []
