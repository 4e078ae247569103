"""Runs what a backend wrote beside the original: a result that tells less than nothing is not kept.

KL(original || result) is held against KL(original || uniform) = log V - H(original): what knowing nothing at all would
cost. A result above that is noise, however its file looks.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import QualityError
from quantcli.evaluate.divergence import Scores, score_window
from quantcli.evaluate.language_model import open_language_model

__all__ = ["Verified", "verify"]


@dataclass(frozen=True)
class Verified:
    """What a result lost, on text that it was not made with."""

    windows: int
    tokens: int
    """In each."""
    kl: float
    """Mean KL(original || result) in nats per token."""
    uniform_kl: float
    """The same of a model that knows nothing."""
    top1: float
    """Share of tokens where both have the same first choice."""
    perplexity: float
    reference_perplexity: float

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"beside the original on {self.windows} windows of {self.tokens} tokens: "
            f"KL {self.kl:.4f}, top-1 {self.top1:.1%}, perplexity {self.perplexity:.2f} "
            f"(original {self.reference_perplexity:.2f})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def verify(original: Path, made: Path, windows: Tensor, trust_remote_code: bool) -> Verified:
    """Scores a result.

    Args:
        original: Folder of the float model.
        made: Folder of the result.
        windows: [W, T] int64.
        trust_remote_code: Run model code that the original brings along.

    Raises:
        InputError: the result cannot be opened, gives logits that are not numbers, or has another vocabulary.
        QualityError: it is noise.
    """
    scores, entropy = Scores(), []
    model = open_language_model(original, "cpu", trust_remote_code)
    try:
        result = open_language_model(made, "cpu", trust_remote_code)
        try:
            for window in windows:
                reference = model.logits(window)
                score_window(scores, window, result.logits(window), reference)
                log = torch.log_softmax(reference[:-1], dim=1)
                entropy.append(-(log.exp() * log).nan_to_num(0.0).sum(1, dtype=torch.float64))
        finally:
            result.close()
    finally:
        model.close()
    uniform = math.log(reference.shape[1]) - float(torch.cat(entropy).mean())
    found = Verified(
        windows.shape[0],
        windows.shape[1],
        scores.kl_mean,
        uniform,
        scores.top1_agreement,
        scores.perplexity,
        scores.reference_perplexity,
    )
    if not found.kl < uniform:
        raise QualityError(
            f"the result is noise: KL {found.kl:.4f} to the original, a model that knows nothing has {uniform:.4f}",
            hint="use more bits or another method; nothing was kept",
        )
    return found
