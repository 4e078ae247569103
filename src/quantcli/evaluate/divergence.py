"""How good a model is on text, and how far from its reference; one window at a time.

Symbols: W windows of T tokens, V vocabulary. The first token of a window has nothing before it and is not scored, so
each window gives T - 1 scores. KL is KL(reference || model) over the whole vocabulary, in nats per token.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantcli.errors import InputError

__all__ = ["Scores", "score_window"]

# Tokens whose full distributions exist in float at once.
_CHUNK = 64


@dataclass
class Scores:
    """Scores per token, one [T - 1] float64 tensor per window."""

    loss: list[Tensor] = field(default_factory=list)
    """Negative log-likelihood of the model."""
    reference_loss: list[Tensor] = field(default_factory=list)
    """Negative log-likelihood of the reference."""
    kl: list[Tensor] = field(default_factory=list)
    """KL(reference || model)."""
    agrees: list[Tensor] = field(default_factory=list)
    """1.0 where both give the same token the highest probability."""

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(float(torch.cat(self.loss).mean()))

    @property
    def reference_perplexity(self) -> float:
        """The same of the reference."""
        return math.exp(float(torch.cat(self.reference_loss).mean()))

    @property
    def kl_mean(self) -> float:
        """Mean over tokens."""
        return float(torch.cat(self.kl).mean())

    @property
    def kl_standard_error(self) -> float | None:
        """Standard error of the mean, clustered by window, as tokens of one text are not independent.

        All windows have as many tokens, so it is the spread of the window means over the square root of their number;
        None for a single window.
        """
        if len(self.kl) < 2:
            return None
        means = torch.stack([w.mean() for w in self.kl])
        return float(means.std(correction=1)) / math.sqrt(len(means))

    @property
    def kl_99th_percentile(self) -> float:
        """The KL that one token in a hundred exceeds."""
        ordered = torch.cat(self.kl).sort().values
        return float(ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)])

    @property
    def top1_agreement(self) -> float:
        """Share of tokens where both models' first choice is the same."""
        return float(torch.cat(self.agrees).mean())


def score_window(scores: Scores, tokens: Tensor, logits: Tensor, reference: Tensor | None) -> None:
    """Adds one window.

    Args:
        scores: Takes the window.
        tokens: [T] int64.
        logits: [T, V] float32 of the model.
        reference: [T, V] float32 of the reference, or None.

    Raises:
        InputError: logits that are not numbers, or vocabularies of two sizes.
    """
    if reference is not None and reference.shape != logits.shape:
        raise InputError(
            f"the model has a vocabulary of {logits.shape[1]}, the reference of {reference.shape[1]}: "
            "they cannot be compared token by token"
        )
    parts: dict[str, list[Tensor]] = {"loss": [], "reference_loss": [], "kl": [], "agrees": []}
    for start in range(0, len(tokens) - 1, _CHUNK):
        stop = min(start + _CHUNK, len(tokens) - 1)
        target = tokens[start + 1 : stop + 1, None]
        model_log = _log_probabilities(logits[start:stop], "model")
        parts["loss"].append(-model_log.gather(1, target)[:, 0].double())
        if reference is None:
            continue
        reference_log = _log_probabilities(reference[start:stop], "reference")
        parts["reference_loss"].append(-reference_log.gather(1, target)[:, 0].double())
        # the sum runs in double: many tiny terms of both signs
        parts["agrees"].append((model_log.argmax(1) == reference_log.argmax(1)).double())
        share = reference_log.exp()
        terms = torch.where(share > 0, share * (reference_log - model_log), 0)
        parts["kl"].append(terms.sum(1, dtype=torch.float64))
    for name, values in parts.items():
        if values:
            getattr(scores, name).append(torch.cat(values))


def _log_probabilities(logits: Tensor, who: str) -> Tensor:
    out = torch.log_softmax(logits, dim=1)
    if bool(out.isnan().any()):
        raise InputError(f"the {who} gives logits that are not numbers", hint="its weights or its runtime are broken")
    return out
