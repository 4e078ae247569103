"""Loss and accuracies against a text after the other, without batches."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import tiny
from quantcli.data.examples import read_examples
from quantcli.data.labels import find_labels, read_questions
from quantcli.finetune.score import measure, tell_labels
from quantcli.models.load import load
from quantcli.options import ExampleOptions
from quantcli.progress import Silent


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    root = tmp_path_factory.mktemp("score")
    tiny.checkpoint(root / "m")
    rows = [{"q": tiny.words(1 + i % 5, i), "a": ("w50 w51", "w60", "w70")[i % 3]} for i in range(30)]
    (root / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ExampleOptions(
        (str(root / "d.jsonl"),), text_template="{q} w9 {a}", completion_only=True, eval_split="14"
    )
    tokenizer = AutoTokenizer.from_pretrained(root / "m")
    return load(root / "m"), read_examples(options, tokenizer, 0, Silent()), options, tokenizer


def log_probabilities(model, tokens):
    """[T - 1]: of each token but the first."""
    with torch.no_grad():
        told = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return torch.tensor([told[i, token] for i, token in enumerate(tokens[1:])])


@pytest.mark.parametrize("batch_size", [1, 5])
def test_labels(scene, batch_size):
    model, sets, options, tokenizer = scene
    labels = find_labels(sets)
    assert sorted(labels) == ["w50 w51", "w60", "w70"]
    questions = read_questions(sets.eval, labels, options, tokenizer)
    right = 0
    assert len(questions) == len(sets.eval)
    for example in sets.eval:
        scores = {}
        for label in labels:
            prompt = tokenizer(example.texts[0], add_special_tokens=False)["input_ids"]
            whole = [*prompt, *tokenizer(label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            scores[label] = float(log_probabilities(model, whole)[len(prompt) - 1 :].sum())
        right += max(scores, key=scores.get) == example.texts[1]
    found = tell_labels(model, questions, batch_size, 0, Silent(), "")
    assert found == pytest.approx(right / len(questions))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_loss(scene, batch_size):
    model, sets, _, _ = scene
    told = torch.cat([log_probabilities(model, e.tokens)[e.counted_from - 1 :] for e in sets.eval])
    assert measure(model, sets.eval, batch_size, 0, Silent(), "").loss == pytest.approx(-float(told.mean()), rel=1e-5)
