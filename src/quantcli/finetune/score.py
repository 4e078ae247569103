"""The loss and accuracy that an adapter is judged by, on examples that were held out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from quantcli.data.examples import IGNORED, Example, collate
from quantcli.data.labels import Question
from quantcli.errors import InputError, UsageError
from quantcli.progress import Progress

__all__ = ["Score", "keep_no_cache", "measure", "refuse_leaking_packs", "tell_labels"]

_LEAK = 1e-3


@dataclass(frozen=True)
class Score:
    """How well a model tells the held-out examples."""

    loss: float
    """Cross entropy per counted token, in nats."""
    accuracy: float | None
    """Share of completions whose every token is the most likely one: what greedy decoding would write. None where
    examples have no completion."""
    label_accuracy: float | None = None
    """Share of prompts whose label is the likeliest of all labels; None where completions are no labels."""


@torch.no_grad()
def measure(
    model: Any, examples: Sequence[Example], batch_size: int, pad: int, progress: Progress, label: str
) -> Score:
    """Loss per token and, where examples have completions, how many are told exactly.

    Raises:
        InputError: no token counts, or the model's output is not finite.
    """
    keep_no_cache(model)
    model.eval()
    loss, counted, right, answers = 0.0, 0, 0, 0
    with progress.track(label, len(examples)) as task:
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            batch = {k: v.to(model.device) for k, v in collate([[e] for e in part], pad).items()}
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, :-1].float()
            targets = labels[:, 1:]
            loss += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"))
            counted += int((targets != IGNORED).sum())
            hits = logits.argmax(-1) == batch["input_ids"][:, 1:]
            for row, example in enumerate(part):
                first, stop = example.answer
                if stop > first:
                    answers += 1
                    right += bool(hits[row, max(first - 1, 0) : stop - 1].all())
            task.advance(len(part))
    if counted == 0:
        raise InputError("the held-out examples hold no token to predict")
    if not math.isfinite(loss):
        raise InputError("the model's output is not finite", hint="add --torch-dtype float32")
    return Score(loss / counted, right / answers if answers else None)


@torch.no_grad()
def tell_labels(
    model: Any, questions: Sequence[Question], batch_size: int, pad: int, progress: Progress, label: str
) -> float:
    """Share of prompts behind which the right label is the likeliest of all labels, its end included.

    Args:
        model: As for `measure`.
        questions: At least one.
        batch_size: Texts that go through the model together.
        pad: Token that fills rows up.
        progress: Told of each batch.
        label: What the work is called.
    """
    keep_no_cache(model)
    model.eval()
    texts = [(answer, question.begin) for question in questions for answer in question.answers]
    scores: list[float] = []
    with progress.track(label, len(texts)) as task:
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            batch = {k: v.to(model.device) for k, v in collate([[e] for e, _ in part], pad).items() if k != "labels"}
            logits = model(**batch).logits[:, :-1].float()
            told = -cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
            scores += [
                float(told[row, max(begin - 1, 0) : len(e.tokens) - 1].sum()) for row, (e, begin) in enumerate(part)
            ]
            task.advance(len(part))
    chosen = torch.tensor(scores).view(len(questions), -1).argmax(1)
    return float((chosen == torch.tensor([q.right for q in questions])).float().mean())


@torch.no_grad()
def refuse_leaking_packs(model: Any, examples: Sequence[Example], pad: int) -> None:
    """Refuses to pack for a model whose examples would see each other in one row: some families know no such mask.

    Raises:
        UsageError: it is one.
    """
    two = sorted(examples, key=lambda e: len(e.tokens))[-2:]
    if len(two) < 2:
        return
    keep_no_cache(model)
    model.eval()
    batch = {k: v.to(model.device) for k, v in collate([two], pad).items() if k != "labels"}
    together = model(**batch).logits[0, len(two[0].tokens) :].float()
    alone = model(input_ids=torch.tensor([two[1].tokens], device=model.device)).logits[0].float()
    if (together - alone).norm() > _LEAK * max(float(alone.norm()), 1.0) * (1 if alone.device.type == "cpu" else 30):
        raise UsageError("examples packed into one row would see each other in this model", hint="leave --packing out")


def keep_no_cache(model: Any) -> None:
    """Turns the cache off: nothing is generated, and beside one transformers would not look for packed examples."""
    model.config.get_text_config().use_cache = False
