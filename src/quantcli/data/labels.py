"""Completions that are labels: few of them, each many times, so that a model can be asked which one fits best."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.data.examples import Example, ExampleReader, ExampleSets
from quantcli.options import ExampleOptions

__all__ = ["Question", "find_labels", "read_questions"]

_MOST_LABELS, _ROWS_EACH = 10, 4


@dataclass(frozen=True)
class Question:
    """One prompt with every label behind it."""

    answers: list[Example]
    """In the order of the labels."""
    right: int
    """Which of them the data say."""
    begin: int
    """The first token in which answers may differ."""


def find_labels(sets: ExampleSets) -> list[str]:
    """The completions of all examples, the most frequent first; none where they are not labels."""
    counts = Counter(e.texts[1] for e in (*sets.train, *sets.eval))
    total = counts.total()
    if not 2 <= len(counts) <= _MOST_LABELS or _ROWS_EACH * len(counts) > total or "" in counts:
        return []
    return [label for label, _ in counts.most_common()]


def read_questions(
    examples: Sequence[Example], labels: Sequence[str], options: ExampleOptions, tokenizer: Any
) -> list[Question]:
    """Each example's prompt with each label; those that are too long for one of them are left out."""
    reader = ExampleReader(options, tokenizer)
    questions = []
    for example in examples:
        prompt, said = example.texts
        answers = [made for label in labels for made in reader.pair(prompt, label)]
        if len(answers) == len(labels) and not reader.cut:
            begin = min(answer.answer[0] for answer in answers)
            questions.append(Question(answers, labels.index(said), begin))
        reader.cut = 0
    return questions
