"""What an evaluation found."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantcli.graphs.checking.side_by_side import SideBySide

__all__ = ["EvaluationResult", "GraphEvaluation"]


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


@dataclass(frozen=True)
class GraphEvaluation:
    """Two graphs that are no language models, run on the same inputs."""

    model: str
    """Graph that was judged."""
    reference: str
    """Graph that it was compared with."""
    inputs: str
    """Where the samples came from."""
    compared: "SideBySide"
    """Distance of each output, and both latencies."""
    timed: bool
    """Whether latencies are told."""
    size_bytes: int
    """The graph and its weights on disk."""
    reference_size_bytes: int
    """The same of the reference."""
    metric: str | None = None
    """Name of the user's function; None where none was given."""
    score: float | None = None
    """What it returned for the graph."""
    reference_score: float | None = None
    """What it returned for the reference."""
    loss: float | None = None
    """By how much the graph's is worse; below 0 where it is better."""
    failures: list[str] = field(default_factory=list)
    """Gates that were not met, a sentence each."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {k: v for k, v in asdict(self).items() if k not in ("compared", "timed")}
        compared = self.compared.to_dict()
        return values | compared | ({} if self.timed else {"float_ms": None, "quantized_ms": None})
