"""What `capture-onnx-graph` was asked to do."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["CaptureOptions"]


@dataclass(frozen=True)
class CaptureOptions:
    """What `quantcli capture-onnx-graph` was asked to do."""

    model: str
    """Checkpoint folder, float or quantized, or an output folder of an earlier command."""
    output: Path = Path("onnx-model")
    """Folder to write."""
    exporter: str = "auto"
    """genai: the ONNX Runtime GenAI model builder; torch: torch.onnx with a KV cache; auto: the builder where it knows
    the model and its graph computes what the checkpoint does, else torch, saying why."""
    task: str | None = None
    """What the model is captured for, as transformers' pipelines name it: text-generation, text2text-generation,
    feature-extraction, text-classification and so on. Default: found in config.json."""
    precision: str | None = None
    """fp32, fp16, int4 or int8 for float input (default fp32). A quantized checkpoint keeps its codes."""
    target_opset: int | None = None
    """ONNX opset of the torch exporter."""
    block_size: int | None = None
    """Columns per scale when a float model is captured as int4 or int8 (default 32)."""
    accuracy_level: int | None = None
    """Arithmetic of MatMulNBits: 0 exact, 1 fp32, 2 fp16, 3 bf16, 4 int8. Default: 4 where it keeps the top tokens
    (measured), else 0."""
    lm_head_bits: int | None = None
    """Bits of the output head: 4, 8 or 16 (float). Default: as in the checkpoint."""
    trust_remote_code: bool = False
    """Run model code that the folder brings along."""
    force: bool = False
    """Replace an output folder of ours."""
