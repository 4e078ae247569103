"""What `evaluate` was asked to do."""

from dataclasses import dataclass, field
from pathlib import Path

from quantcli.errors import UsageError
from quantcli.options.simulation import SimulationOptions

__all__ = ["EvaluateOptions"]


@dataclass(frozen=True)
class EvaluateOptions:
    """What `quantcli evaluate` was asked to do."""

    model: str
    """Folder to judge: float, quantized or ONNX GenAI."""
    reference: str | None = None
    """Folder to compare with, usually the original."""
    data: str | None = None
    """Text to evaluate on; default: Python's own documentation."""
    text_field: str | None = None
    """Field of a jsonl, csv or parquet row that holds the text (default: text)."""
    num_samples: int = 16
    """Windows of text."""
    seq_len: int = 512
    """Tokens per window."""
    reference_cache: Path | None = None
    """Folder that keeps the reference's logits (4 bytes per token and word of the vocabulary) from run to run: the
    reference then runs once, however many models are judged beside it."""
    max_kl: float | None = None
    """Fail with exit code 5 where the mean KL divergence is above this."""
    max_perplexity_increase: float | None = None
    """Fail with exit code 5 where perplexity grows by more than this share (0.05 is 5%)."""
    speed: bool = True
    """Measure prefill and decode speed; never where quantization is simulated, which takes time that it would save."""
    simulation: SimulationOptions = field(default_factory=SimulationOptions)
    """Quantization of activations and KV cache."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    trust_remote_code: bool = False
    """Run model code that the folder brings along."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
        for name in ("max_kl", "max_perplexity_increase", "reference_cache"):
            if getattr(self, name) is not None and self.reference is None:
                raise UsageError(f"--{name.replace('_', '-')} needs --reference", hint="add --reference ORIGINAL")
