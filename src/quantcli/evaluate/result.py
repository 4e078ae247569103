"""What an evaluation found."""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["EvaluationResult"]


@dataclass(frozen=True)
class EvaluationResult:
    """Figures of one model, and of its distance to a reference where one was given."""

    model: str
    """Folder that was judged."""
    reference: str | None
    """Folder that it was compared with."""
    text: str
    """Where the text came from."""
    windows: int
    """Pieces of text."""
    tokens: int
    """Tokens scored: all but the first of each window."""
    perplexity: float
    """Of the model."""
    size_bytes: int
    """Weight files on disk."""
    quantized_bits_per_weight: float | None
    """Of the quantized weights, scales and zero points included; None where nothing is quantized."""
    bits_per_weight: float | None
    """Of the whole model."""
    reference_perplexity: float | None = None
    """Of the reference."""
    reference_size_bytes: int | None = None
    """Weight files of the reference."""
    kl_mean: float | None = None
    """Mean KL(reference || model) in nats per token."""
    kl_standard_error: float | None = None
    """Its standard error, clustered by window; None for a single window."""
    kl_99th_percentile: float | None = None
    """KL that one token in a hundred exceeds."""
    top1_agreement: float | None = None
    """Share of tokens where both models' first choice is the same."""
    prefill_tokens_per_second: float | None = None
    """Reading one window."""
    decode_tokens_per_second: float | None = None
    """Writing token by token, batch of one."""
    peak_memory_bytes: int | None = None
    """Memory of the process while the model was opened and timed, above that before."""
    simulated: dict[str, Any] | None = None
    """How activations and cache were rounded; None where they were not."""
    failures: list[str] = field(default_factory=list)
    """Gates that were not met, a sentence each."""

    @property
    def perplexity_increase(self) -> float | None:
        """Growth of perplexity over the reference, as a share: 0.05 is 5%."""
        if self.reference_perplexity is None:
            return None
        return self.perplexity / self.reference_perplexity - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"perplexity_increase": self.perplexity_increase}
