"""What `evaluate` was asked to do."""

from dataclasses import dataclass, field
from pathlib import Path

from quantcli.errors import UsageError
from quantcli.options.simulation import SimulationOptions

__all__ = ["EvaluateOptions", "GraphEvaluationOptions"]


@dataclass(frozen=True)
class GraphEvaluationOptions:
    """How two ONNX graphs that are no language models are compared."""

    user_script: Path | None = None
    """A Python file with --data-function, --metric-function or both; it is run."""
    data_function: str | None = None
    """Its function that returns an iterable of dictionaries by input name, or an object with get_next. It may take
    data_dir (what --data says) and batch_size by name."""
    metric_function: str | None = None
    """Its function that judges a graph: called with an onnxruntime InferenceSession of each, and with data_dir and
    batch_size where it takes them by name; returns a number, higher is better."""
    lower_is_better: bool = False
    """The number that --metric-function returns is better where it is lower."""
    image_spec: str | None = None
    """How images of the folder --data become inputs, as for quantize: size=224x224,mean=0.5,std=0.5,…"""
    batch_size: int = 1
    """Rows of --data at a time, where the graph leaves that open."""
    min_sqnr: float | None = None
    """Fail with exit code 5 where an output has less signal to quantization noise than this, in dB."""
    max_loss: float | None = None
    """Fail with exit code 5 where the number of --metric-function is worse than the reference's by more than this."""

    def __post_init__(self) -> None:
        named = [n for n in ("data_function", "metric_function") if getattr(self, n) is not None]
        if self.user_script is None and named:
            raise UsageError(f"--{named[0].replace('_', '-')} needs --user-script", hint="add --user-script FILE.py")
        if self.user_script is not None and not named:
            raise UsageError(
                "--user-script says nothing of which function to call",
                hint="add --metric-function NAME or --data-function NAME",
            )
        for flag, given in (("--max-loss", self.max_loss is not None), ("--lower-is-better", self.lower_is_better)):
            if given and self.metric_function is None:
                raise UsageError(f"{flag} needs --metric-function", hint="add --user-script FILE.py and its function")
        if self.data_function is not None and self.image_spec is not None:
            raise UsageError("--data-function and --image-spec exclude each other", hint="leave one out")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size must be 1 or more, got {self.batch_size}")
        if self.min_sqnr is not None and not 0 <= self.min_sqnr < 200:
            raise UsageError(f"--min-sqnr is 0 or more and below 200 dB, got {self.min_sqnr:g}")
        if self.max_loss is not None and self.max_loss < 0:
            raise UsageError(f"--max-loss must be 0 or more, got {self.max_loss:g}")


@dataclass(frozen=True)
class EvaluateOptions:
    """What `quantcli evaluate` was asked to do."""

    model: str
    """Folder to judge: float, quantized or ONNX GenAI; or any ONNX graph, an .onnx file or a folder with one."""
    reference: str | None = None
    """What to compare with, usually the original."""
    data: str | None = None
    """Text to evaluate on; default: Python's own documentation. For other graphs: inputs, an .npz file or a folder of
    them, or of images; default: made from the graph."""
    text_field: str | None = None
    """Field of a jsonl, csv or parquet row that holds the text (default: text)."""
    num_samples: int = 16
    """Windows of text; for other graphs, most samples that are run."""
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
    pair: GraphEvaluationOptions = field(default_factory=GraphEvaluationOptions)
    """Of graphs that are no language models."""
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
