"""What a command is told about an ONNX graph."""

from dataclasses import dataclass
from pathlib import Path

from quantcli.errors import UsageError, nearest
from quantcli.options.regex import compile_regex

__all__ = ["GRAPH_ENCODINGS", "GRAPH_OP_TYPES", "GraphOptions"]

GRAPH_ENCODINGS = ("nbits", "qdq", "qoperator")
GRAPH_OP_TYPES = ("MatMul", "Gemm", "Gather", "Conv")


@dataclass(frozen=True)
class GraphOptions:
    """What quantizing an ONNX graph takes beyond what checkpoints take."""

    encoding: str | None = None
    """nbits: MatMulNBits and GatherBlockQuantized of com.microsoft; qdq: DequantizeLinear, with blocks (opset 21) where
    weights alone are quantized; qoperator: operators on integers. Default: nbits; qdq for static."""
    accuracy_level: int = 0
    """Arithmetic of MatMulNBits: 0 exact, 1 fp32, 2 fp16, 3 bf16, 4 int8."""
    op_types: tuple[str, ...] = ()
    """Operators to quantize, joined by commas: MatMul, Gemm, Gather (embeddings), Conv (with qdq) where weights alone
    are quantized, what onnxruntime can with dynamic and static. Default: MatMul,Gemm; all with dynamic and static."""
    nodes_include: tuple[str, ...] = ()
    """Name or regular expression of nodes; given once or more, only these are quantized."""
    nodes_exclude: tuple[str, ...] = ()
    """Name or regular expression of nodes that stay float."""
    quantize_last_matmul: bool = True
    """Quantize products with no other product behind them, such as a language model's output head."""
    calibration_inputs: Path | None = None
    """An .npz file or a folder of them, arrays named as the graph's inputs, rows along the first axis; or, with
    --image-spec, a folder of images. Language models need none: text is made into their inputs."""
    image_spec: str | None = None
    """How images become inputs: size=224x224, and after commas mean=0.5/0.5/0.5, std=0.2/0.2/0.2 (per channel or one
    for all), scale=0.0039 (of the pixels, before that), layout=nchw or nhwc, order=rgb, bgr or gray."""
    user_script: Path | None = None
    """A Python file with a function that returns samples; it is run."""
    data_function: str | None = None
    """The function in --user-script: returns an iterable of dictionaries by input name, or an object with get_next."""
    calibration_cache: Path | None = None
    """File of measured ranges: read where it is there, else written; static only."""
    debug_activations: bool = False
    """Compare float and integer graph node by node on the samples, the worst first; dynamic and static only."""
    exclude_worst: int = 0
    """Quantize again without so many nodes, those that lose most by their own rounding; dynamic and static only."""
    layer_wise: bool = False
    """Quantize in the order in which inputs flow: each matrix sees what the quantized ones before it made of them, and
    gptq corrects their error. The graph runs step by step, each node twice: float and quantized."""

    min_sqnr: float = 10.0
    """Least signal to quantization noise of every output beside the float graph, in dB; nodes that cost most go back to
    float until it holds. 0 takes the graph as it comes."""
    smaller_only: bool = False
    """Refuse a result that is not smaller than the graph. Without it, integers are kept whatever they take, and weights
    alone where the graph is below 1 MB; both are said."""

    faster: bool = False
    """Take what is faster on this machine, as timed: int8 weights for uint8, and kinds of nodes in float; dynamic and
    static only."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_sqnr < 200:
            raise UsageError(f"--min-sqnr is 0 or more and below 200 dB, got {self.min_sqnr:g}")
        if self.encoding is not None and self.encoding not in GRAPH_ENCODINGS:
            raise UsageError(f"unknown --encoding {self.encoding!r}, {nearest(self.encoding, GRAPH_ENCODINGS)}")
        if self.accuracy_level not in range(5):
            raise UsageError(f"--accuracy-level must be 0 to 4, got {self.accuracy_level}")
        if self.accuracy_level and self.encoding == "qdq":
            raise UsageError("--accuracy-level is an attribute of MatMulNBits", hint="use --encoding nbits")
        if self.exclude_worst < 0:
            raise UsageError(f"--exclude-worst must be 0 or more, got {self.exclude_worst}")
        if (self.user_script is None) != (self.data_function is None):
            raise UsageError("--user-script and --data-function go together", hint="give both")
        if self.user_script is not None and self.calibration_inputs is not None:
            raise UsageError("--user-script and --calibration-inputs exclude each other", hint="leave one out")
        if self.image_spec is not None and self.calibration_inputs is None:
            raise UsageError("--image-spec is for a folder of images", hint="add --calibration-inputs FOLDER")
        for pattern in self.nodes_include:
            compile_regex(pattern, "--nodes-include")
        for pattern in self.nodes_exclude:
            compile_regex(pattern, "--nodes-exclude")
