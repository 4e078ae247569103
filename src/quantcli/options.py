"""What each command was asked to do: frozen, checked once, passed whole.

A field's docstring is its help text on the command line. `None` means "inherit"; `pipelines` resolve it in one place.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from quantcli.errors import UsageError, nearest
from quantcli.scheme import PER_CHANNEL

__all__ = [
    "FORMATS",
    "MIXED_BITS",
    "PRESETS",
    "CalibrationOptions",
    "CaptureOptions",
    "EvaluateOptions",
    "GraphOptions",
    "Override",
    "QuantizeOptions",
    "SimulationOptions",
]

PRESETS = ("fast", "balanced", "best")
DTYPES = ("keep", "float32", "float16", "bfloat16")
FORMATS = ("gptq", "awq", "compressed-tensors", "bnb", "float")
GRAPH_ENCODINGS = ("nbits", "qdq", "qoperator")
GRAPH_OP_TYPES = ("MatMul", "Gemm", "Gather", "Conv")
SELF, BUILTIN = "self", "builtin"
FLOAT_BITS = 16
MIXED_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class CalibrationOptions:
    """Which text statistics are gathered on."""

    data: str | None = None
    """Text to calibrate on: a txt, jsonl, csv or parquet file, `self` (text that the model writes itself) or
    `builtin` (Python's own documentation). Default: self, or builtin where sampling would cost more than quantizing."""
    data_name: str | None = None
    """Data set on the Hugging Face hub or in its cache."""
    data_split: str = "train"
    """Split of the hub data set."""
    text_field: str | None = None
    """Field of a jsonl, csv, parquet or hub row that holds the text (default: text)."""
    text_template: str | None = None
    """Text made of several fields, as in "Q: {question}\\nA: {answer}"."""
    use_chat_template: bool = False
    """Render rows with a `messages` field by the model's chat template."""
    num_samples: int = 64
    """Calibration rows."""
    seq_len: int = 512
    """Tokens per calibration row."""
    batch_size: int = 1
    """Rows that go through a block together; more takes more memory and, on a CPU, more time."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
        if self.data is not None and self.data_name is not None:
            raise UsageError("--data and --data-name exclude each other", hint="leave one out")
        chosen = [n for n in ("text_field", "text_template") if getattr(self, n) is not None]
        chosen += ["use_chat_template"] if self.use_chat_template else []
        if len(chosen) > 1:
            flags = " and ".join("--" + n.replace("_", "-") for n in chosen)
            raise UsageError(f"{flags} exclude each other", hint="leave one out")
        if chosen and self.data in (SELF, BUILTIN):
            raise UsageError(
                f"--{chosen[0].replace('_', '-')} needs --data FILE or --data-name, not --data {self.data}"
            )


@dataclass(frozen=True)
class SimulationOptions:
    """Activations and KV cache as few bits would hold them, simulated when a model is evaluated."""

    a_bits: int = 16
    """Bits of what the blocks' linears are given, one grid per token, 2 to 8; 16 leaves it float."""
    k_bits: int = 16
    """Bits of cached keys, one grid per token and head, 2 to 8; 16 leaves them float."""
    v_bits: int = 16
    """Bits of cached values, one grid per token and head, 2 to 8; 16 leaves them float."""
    a_symmetric: bool = True
    """Symmetric or asymmetric grids for activations."""
    a_clip_ratio: float | None = None
    """Share of a token's range that its grid spans. Default: 0.9 below 8 bits, as in QuaRot; 1 at 8, where clipping
    costs more than it gains."""
    kv_symmetric: bool = False
    """Symmetric or asymmetric grids for keys and values."""
    kv_group_size: int = -1
    """Entries of a head that share a grid; -1 is the whole head."""
    kv_clip_ratio: float | None = None
    """Share of a head's range that its grid spans. Default: 0.95 below 8 bits, as in QuaRot; 1 at 8."""

    def __post_init__(self) -> None:
        for name in ("a_bits", "k_bits", "v_bits"):
            bits = getattr(self, name)
            if not 2 <= bits <= 8 and bits != FLOAT_BITS:
                raise UsageError(f"--{name.replace('_', '-')} must be 2 to 8, or 16 for none, got {bits}")
        for name in ("a_clip_ratio", "kv_clip_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 < ratio <= 1:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0 and at most 1, got {ratio:g}")
        if self.kv_group_size != -1 and self.kv_group_size < 2:
            raise UsageError(f"--kv-group-size must be 2 or more, or -1 for the head, got {self.kv_group_size}")
        self._refuse_idle("a", self.a_bits == FLOAT_BITS, "--a-bits")
        self._refuse_idle("kv", self.k_bits == self.v_bits == FLOAT_BITS, "--k-bits or --v-bits")

    @property
    def simulates(self) -> bool:
        """Whether anything is rounded."""
        return (self.a_bits, self.k_bits, self.v_bits) != (FLOAT_BITS,) * 3

    @property
    def activation_clip(self) -> float:
        """The share of a token's range that is used."""
        return _clip_ratio(self.a_clip_ratio, self.a_bits, 0.9)

    def cache_clip(self, bits: int) -> float:
        """The share of a head's range that is used for keys or values of so many bits."""
        return _clip_ratio(self.kv_clip_ratio, bits, 0.95)

    def resolved(self) -> dict[str, Any]:
        """Plain values of what is rounded, defaults filled in."""
        values = asdict(self)
        del values["kv_clip_ratio"]
        used: dict[str, tuple[int, float]] = {
            "a": (self.a_bits, self.activation_clip),
            "k": (self.k_bits, self.cache_clip(self.k_bits)),
            "v": (self.v_bits, self.cache_clip(self.v_bits)),
        }
        return values | {f"{n}_clip_ratio": None if b == FLOAT_BITS else clip for n, (b, clip) in used.items()}

    def describe(self) -> str:
        """What is rounded, in words."""
        parts = []
        if self.a_bits != FLOAT_BITS:
            kind = "sym" if self.a_symmetric else "asym"
            parts.append(f"activations {self.a_bits} bits {kind} per token, clip {self.activation_clip:g}")
        kind = "sym" if self.kv_symmetric else "asym"
        group = "head" if self.kv_group_size == -1 else f"{self.kv_group_size} entries of a head"
        for name, bits in (("keys", self.k_bits), ("values", self.v_bits)):
            if bits != FLOAT_BITS:
                parts.append(f"{name} {bits} bits {kind} per token and {group}, clip {self.cache_clip(bits):g}")
        return "; ".join(parts)

    def _refuse_idle(self, prefix: str, idle: bool, needed: str) -> None:
        """No flag without effect: a grid where nothing is rounded."""
        for spec in fields(self):
            grid = spec.name.startswith(prefix + "_") and not spec.name.endswith("_bits")
            if idle and grid and getattr(self, spec.name) != spec.default:
                flag = {"a_symmetric": "--a-asym", "kv_symmetric": "--kv-sym"}.get(
                    spec.name, "--" + spec.name.replace("_", "-")
                )
                raise UsageError(f"{flag} would have no effect without {needed}", hint=f"add {needed.split()[0]} 4")


def _clip_ratio(given: float | None, bits: int, few: float) -> float:
    return given if given is not None else few if bits < 8 else 1.0


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
    gptq corrects their error. The graph is run once per step of that order."""

    def __post_init__(self) -> None:
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


@dataclass(frozen=True)
class Override:
    """Another scheme for the linears whose name matches."""

    pattern: str
    """Regular expression, searched in the module name."""
    bits: int | None = None
    """Bits per weight there."""
    group_size: int | None = None
    """Group size there."""
    symmetric: bool | None = None
    """Symmetric grid there."""

    @classmethod
    def parse(cls, text: str) -> "Override":
        """Reads `REGEX=bits=8,group_size=32,sym=true`."""
        hint = "write --override 'REGEX=bits=8,group_size=32'"
        match = re.fullmatch(r"(?P<pattern>.+?)=(?P<settings>(?:[a-z_-]+=[^=,]+)(?:,[a-z_-]+=[^=,]+)*)", text)
        if match is None:
            raise UsageError(f"override {text!r} is not of the form REGEX=KEY=VALUE,...", hint=hint)
        values: dict[str, Any] = {}
        for setting in match["settings"].split(","):
            key, value = setting.split("=")
            key = {"sym": "symmetric"}.get(key.replace("-", "_"), key.replace("-", "_"))
            if key not in ("bits", "group_size", "symmetric"):
                raise UsageError(
                    f"override {text!r}: unknown key {key!r}, {nearest(key, ('bits', 'group_size', 'sym'))}",
                    hint=hint,
                )
            values[key] = _parse_bool(value, text) if key == "symmetric" else _parse_int(value, text)
        return cls(compile_regex(match["pattern"], "--override"), **values)


@dataclass(frozen=True)
class QuantizeOptions:
    """What `quantcli quantize` was asked to do."""

    model: str
    """Model to quantize: a checkpoint folder, an output folder of an earlier command, a hub id; or an .onnx file or a
    folder with one."""
    output: Path
    """Folder to write."""
    algorithm: str | None = None
    """Algorithm, or transforms and a rounder joined by commas, as awq,gptq; `quantcli algorithms` lists them. Default:
    what the preset says, gptq for balanced."""
    preset: str | None = None
    """fast: kquant without data; balanced: gptq with static act-order and a weighted grid; best: that, then scale
    refit and coordinate descent. Default: balanced."""
    settings: dict[str, str] = field(default_factory=dict)
    """Further options of the algorithms, as `quantcli algorithms NAME` lists them; NAME.KEY where two have one."""
    bits: int | None = None
    """Bits per weight. Default: 4; 8 for dynamic and static."""
    group_size: int = 64
    """Input columns that share a scale; -1 is one scale per output row."""
    symmetric: bool = False
    """Symmetric grid (zero point fixed in the middle) or asymmetric."""
    target_bits: float | None = None
    """Mixed bits: the average of stored bits per quantized weight, scales and zero points included, as runs report it;
    met within 1% below. Which linear gets how many bits is chosen by measuring what each costs."""
    target_size: int | None = None
    """Mixed bits: the size of the written weight files, float tensors included, as 60MB; met within 1% below."""
    mixed_bits: tuple[int, ...] = ()
    """Bits to choose from with a target, as 3,4,8. Default: what algorithm and format can do of 2,3,4,8."""
    quantize_lm_head: bool = False
    """Quantize the output head too; a head tied to the embedding gets its own codes."""
    quantize_embeddings: bool = False
    """Quantize the input embedding too (8 bits, rtn); read by quantcli's own loader and capture only."""
    exclude: tuple[str, ...] = ()
    """Regular expressions of linears that stay float."""
    overrides: tuple[Override, ...] = ()
    """Other bits, group size or symmetry for some linears; the last match wins."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """Calibration text."""
    format: str | None = None
    """How linears are stored: gptq (v1), awq (gemm, 4 bits), compressed-tensors (pack-quantized), bnb (bitsandbytes,
    nf4 and fp4) or float (dequantized, which every tool reads). Default: bnb for nf4 and fp4, gptq for the others."""
    correct_earlier: bool = False
    """Let each block also correct the error of the blocks before it, where that lowers its held-out error."""
    dtype: str = "keep"
    """Type of the tensors that stay float: keep, float32, float16 or bfloat16."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    max_memory: int | None = None
    """Bytes of memory that the run may take; default: what is free."""
    trust_remote_code: bool = False
    """Run model code that the folder brings along."""
    evaluate: bool = False
    """Evaluate the written folder against the original."""
    simulation: SimulationOptions = field(default_factory=SimulationOptions)
    """What `evaluate` rounds beside the weights."""
    graph: GraphOptions = field(default_factory=GraphOptions)
    """Where the model is an ONNX graph."""
    force: bool = False
    """Replace an output folder of ours, or an interrupted run with other options."""
    dry_run: bool = False
    """Print the plan with estimated size, memory and time, and do nothing."""

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise UsageError(f"unknown preset {self.preset!r}, {nearest(self.preset, PRESETS)}")
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}, {nearest(self.dtype, DTYPES)}")
        if self.format is not None and self.format not in FORMATS:
            raise UsageError(f"unknown format {self.format!r}, {nearest(self.format, FORMATS)}")
        if self.group_size != PER_CHANNEL and self.group_size < 16:
            raise UsageError(f"group size must be 16 or more, or -1 for per channel, got {self.group_size}")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise UsageError(f"bits must be 1 to 8, got {self.bits}")
        for pattern in self.exclude:
            compile_regex(pattern, "--exclude")
        if self.simulation.simulates and not self.evaluate:
            raise UsageError(
                "--a-bits, --k-bits and --v-bits are simulated when a result is evaluated; a checkpoint holds weights",
                hint="add --evaluate, or give them to `quantcli evaluate`",
            )
        self._check_mixed()

    @property
    def weight_bits(self) -> int:
        """Bits per weight where single weights are rounded."""
        return 4 if self.bits is None else self.bits

    @property
    def mixes(self) -> bool:
        """Whether the bits of each linear are chosen to meet a target."""
        return self.target_bits is not None or self.target_size is not None

    def matching(self, name: str) -> list[Override]:
        """Overrides of the linear of that name, the last of which wins."""
        return [override for override in self.overrides if re.search(override.pattern, name)]

    def _check_mixed(self) -> None:
        if self.target_bits is not None and self.target_size is not None:
            raise UsageError("--target-bits and --target-size exclude each other", hint="leave one out")
        if not self.mixes:
            if self.mixed_bits:
                raise UsageError("--mixed-bits needs a target", hint="add --target-bits 3.5 or --target-size 60MB")
            return
        flag = "--target-bits" if self.target_bits is not None else "--target-size"
        if self.bits is not None:
            raise UsageError(f"--bits and {flag} exclude each other", hint="say what to mix with --mixed-bits 3,4")
        if self.mixed_bits and len(set(self.mixed_bits)) < 2:
            raise UsageError("--mixed-bits needs two different numbers or more", hint="write --mixed-bits 3,4")
        if any(not 1 <= bits <= 8 for bits in self.mixed_bits):
            raise UsageError(f"--mixed-bits are 1 to 8, got {', '.join(map(str, self.mixed_bits))}")
        if (self.target_bits or self.target_size or 0) <= 0:
            raise UsageError(f"{flag} must be above 0, got {self.target_bits or self.target_size or 0}")


@dataclass(frozen=True)
class CaptureOptions:
    """What `quantcli capture-onnx-graph` was asked to do."""

    model: str
    """Checkpoint folder, float or quantized, or an output folder of an earlier command."""
    output: Path = Path("onnx-model")
    """Folder to write."""
    exporter: str = "genai"
    """genai: the ONNX Runtime GenAI model builder; torch: torch.onnx with a KV cache."""
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
        for name in ("max_kl", "max_perplexity_increase"):
            if getattr(self, name) is not None and self.reference is None:
                raise UsageError(f"--{name.replace('_', '-')} needs --reference", hint="add --reference ORIGINAL")


def compile_regex(pattern: str, flag: str) -> str:
    """The pattern itself, once it is known to be a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{flag} {pattern!r} is not a regular expression: {error}") from error
    return pattern


def _parse_int(value: str, text: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UsageError(f"override {text!r}: {value!r} is not a whole number") from error


def _parse_bool(value: str, text: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UsageError(f"override {text!r}: sym is true or false, got {value!r}")
    return value.lower() == "true"
