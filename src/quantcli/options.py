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
    "ConvertAdapterOptions",
    "EvaluateOptions",
    "ExampleOptions",
    "FinetuneOptions",
    "GenerateAdapterOptions",
    "GenerateOptions",
    "GraphOptions",
    "Override",
    "QuantizeOptions",
    "SimulationOptions",
]

PRESETS = ("fast", "balanced", "best")
METHODS = ("lora", "qlora")
INITS = ("zero", "loftq")
DTYPES = ("keep", "float32", "float16", "bfloat16")
ADAPTER_FORMATS = ("onnx_adapter", "safetensors", "npz")
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
    """fast: kquant without data; balanced: gptq with static act-order and a weighted grid; best: awq's scaling, then
    that, then scale refit and coordinate descent. With -a, the preset's settings of that rounder. Default: balanced."""
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


@dataclass(frozen=True)
class ExampleOptions:
    """Which text a model is trained on, and which part of it the loss counts."""

    data_files: tuple[str, ...] = ()
    """Files to train on: jsonl, csv, tsv, parquet or txt, joined by commas."""
    data_name: str | None = None
    """Data set on the Hugging Face hub or in its cache; the path of a file is taken as --data-files."""
    data_split: str = "train"
    """Split of the hub data set."""
    text_field: str | None = None
    """Field of a row that holds the text (default: text)."""
    text_template: str | None = None
    """Text made of several fields, as in "Q: {question}\\nA: {answer}"."""
    use_chat_template: bool = False
    """Render rows with a `messages` field by the model's chat template."""
    completion_only: bool = False
    """Count the loss on the completion alone: the template's last field and what follows it, or the last message."""
    seq_len: int = 512
    """Most tokens of an example; longer ones are cut."""
    max_samples: int | None = None
    """Most rows that are read, those for evaluation included. Default: all."""
    packing: bool = False
    """Put several examples into one row of --seq-len tokens, none of which sees another."""
    eval_split: str | None = None
    """What the eval loss is measured on: a share of the rows (0.1), a number of rows (200), a file, or the name of a
    split of the hub data set. Default: a tenth of the rows, at most 256."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UsageError(f"--{name.replace('_', '-')} must be 2 or more, got {value}")
        if bool(self.data_files) == (self.data_name is not None):
            what = "exclude each other" if self.data_files else "are both missing"
            raise UsageError(
                f"--data-files and --data-name {what}",
                hint="leave one out" if self.data_files else "add --data-files FILE",
            )
        if self.data_files and self.data_split != ExampleOptions.data_split:
            raise UsageError("--data-split would have no effect on files", hint="leave it out")
        chosen = [n for n in ("text_field", "text_template", "use_chat_template") if getattr(self, n)]
        if len(chosen) > 1:
            flags = " and ".join("--" + n.replace("_", "-") for n in chosen)
            raise UsageError(f"{flags} exclude each other", hint="leave one out")
        if self.completion_only and not (self.text_template or self.use_chat_template):
            raise UsageError(
                "--completion-only needs to know what the completion is",
                hint="add --text-template 'Q: {question}\\nA: {answer}', or --use-chat-template",
            )


@dataclass(frozen=True)
class FinetuneOptions:
    """What `quantcli finetune` was asked to do."""

    model: str
    """Model to adapt: a checkpoint folder, float or quantized, an output folder of an earlier command, or a hub id."""
    examples: ExampleOptions
    """What it is trained on."""
    output: Path = Path("finetuned-model")
    """Folder to write: the base in model/, the adapter in adapter/."""
    method: str = "lora"
    """lora: adapters beside the model as it is; qlora: beside quantized weights, a float model becomes nf4 first."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32
    """Their output is scaled by this over the rank."""
    lora_dropout: float = 0.05
    """Share of their inputs that training leaves out."""
    target_modules: tuple[str, ...] = ()
    """Linears that get an adapter, by the ends of their names, joined by commas, as q_proj,v_proj. Default: every
    linear in the blocks but routers and experts."""
    use_dora: bool = False
    """DoRA: learn the length of each row of a weight beside its direction. ONNX Runtime adapters cannot hold it."""
    init_lora: str = "zero"
    """How adapters begin. zero: as the base; loftq: with the part of the rounding error that their rank can hold."""
    float_model: str | None = None
    """The float model that a quantized base was rounded from, for --init-lora loftq."""
    torch_dtype: str | None = None
    """Type that the model computes in: float32, float16 or bfloat16; adapters are float32. Default: float32 on CPU,
    else the checkpoint's."""
    max_steps: int | None = None
    """Steps of the optimizer. Default: what --num-epochs takes."""
    num_epochs: float | None = None
    """Times that the examples are gone through (default: 3)."""
    learning_rate: float = 2e-4
    """Largest learning rate, after warmup; it falls linearly to 0."""
    batch_size: int = 4
    """Rows that go through the model together."""
    gradient_accumulation: int = 1
    """Batches whose gradients make one step."""
    warmup: float = 0.03
    """Steps in which the learning rate rises from 0: a share of all steps below 1, else their number."""
    eval_steps: int | None = None
    """Steps between measurements of the eval loss while training. Default: none, or a tenth of all steps with
    --early-stopping."""
    early_stopping: int | None = None
    """Stop when so many measurements in a row have not improved the eval loss, and keep the best adapter."""
    save_steps: int | None = None
    """Steps between checkpoints, from which an interrupted run continues. Default: --eval-steps, or a tenth of all."""
    resume: bool = False
    """Only continue an interrupted run, refuse to begin one. The same command continues without it, too."""
    settings: dict[str, str] = field(default_factory=dict)
    """Any other argument of transformers' Trainer, as weight_decay=0.01."""
    seed: int = 0
    """Seed of every random choice."""
    copy_base: bool = False
    """Copy the base into the output; the default makes hard links where the file system can."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    trust_remote_code: bool = False
    """Run model code that the folder brings along."""
    force: bool = False
    """Replace an output folder of ours."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}, {nearest(self.method, METHODS)}")
        if self.init_lora not in INITS:
            raise UsageError(f"unknown --init-lora {self.init_lora!r}, {nearest(self.init_lora, INITS)}")
        if self.init_lora == "loftq" and self.use_dora:
            raise UsageError(
                "--use-dora and --init-lora loftq exclude each other: the lengths of DoRA are those of the base",
                hint="leave one out",
            )
        if self.init_lora != "loftq" and self.float_model is not None:
            raise UsageError("--float-model would have no effect", hint="add --init-lora loftq, or leave it out")
        if self.torch_dtype is not None and self.torch_dtype not in DTYPES[1:]:
            raise UsageError(f"unknown dtype {self.torch_dtype!r}, {nearest(self.torch_dtype, DTYPES[1:])}")
        counts = ("lora_r", "max_steps", "batch_size", "gradient_accumulation")
        for name in (*counts, "eval_steps", "early_stopping", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        for name in ("lora_alpha", "num_epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora-dropout must be at least 0 and below 1, got {self.lora_dropout:g}")
        if self.warmup < 0 or (self.warmup > 1 and self.warmup != int(self.warmup)):
            raise UsageError(f"--warmup must be a share below 1 or a whole number of steps, got {self.warmup:g}")
        if self.max_steps is not None and self.num_epochs is not None:
            raise UsageError("--max-steps and --num-epochs exclude each other", hint="leave one out")


@dataclass(frozen=True)
class GenerateOptions:
    """What `quantcli generate` was asked to do."""

    model: str
    """Folder to run: float, quantized or ONNX GenAI."""
    prompt: str
    """Text to continue."""
    adapter: str | None = None
    """Adapter to run with. In an ONNX folder: NAME of its NAME.onnx_adapter, or such a file. For a checkpoint: a
    folder that peft saved, or its name beside the model (`adapter` in an output folder of finetune)."""
    use_chat_template: bool = False
    """Render the prompt as a user's message by the model's chat template."""
    max_new_tokens: int = 128
    """Tokens to write at most; fewer where the model ends its answer or its positions are used up."""
    temperature: float = 0.0
    """Sample with this temperature; 0 always takes the likeliest token."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability. Default: from all."""
    seed: int | None = None
    """Seed of the samples (default 0)."""
    device: str | None = None
    """cpu, cuda or cuda:N, for checkpoints. Default: cuda where there is one."""
    trust_remote_code: bool = False
    """Run model code that the folder brings along."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("--prompt is empty", hint="write -p 'Once upon a time'")
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens must be 1 or more, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise UsageError(f"--temperature must be 0 or more, got {self.temperature:g}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, got {self.top_p:g}")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed must be 0 to {2**31 - 1}, got {self.seed}")
        for name in ("top_p", "seed"):
            if getattr(self, name) is not None and self.temperature == 0:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} would have no effect without --temperature", hint="add --temperature 0.8")


@dataclass(frozen=True)
class ConvertAdapterOptions:
    """What `quantcli convert-adapter` was asked to do."""

    model: str
    """Base that it is for: a folder that generate-adapter wrote."""
    adapter: Path
    """Adapter folder that peft saved."""
    output: Path
    """File to write; without an ending it gets that of the format."""
    adapter_format: str = "onnx_adapter"
    """File format: onnx_adapter, which ONNX Runtime loads, safetensors or npz."""
    force: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        _check_adapter_format(self.adapter_format)


@dataclass(frozen=True)
class GenerateAdapterOptions:
    """What `quantcli generate-adapter` was asked to do."""

    model: str
    """Base model: a checkpoint, float or quantized, a captured ONNX folder, or an output folder of finetune."""
    output: Path
    """Folder to write."""
    adapters: tuple[str, ...] = ()
    """Adapter folder that peft saved, as FOLDER or NAME=FOLDER; may be given several times. Default: the adapter of
    finetune's output folder."""
    adapter_format: str = "onnx_adapter"
    """File format of the adapters: onnx_adapter, which ONNX Runtime loads, safetensors or npz."""
    only_adapted: bool = False
    """Let only linears that these adapters change take adapters: faster where they are few, but later adapters can
    change no others. Default: every linear of the blocks."""
    trust_remote_code: bool = False
    """Run model code that the folder brings along."""
    force: bool = False
    """Replace an output folder of ours."""

    def __post_init__(self) -> None:
        _check_adapter_format(self.adapter_format)

    def named(self) -> dict[str, Path]:
        """The adapters by name: what stands before `=`, else the folder's own."""
        found: dict[str, Path] = {}
        for word in self.adapters:
            name, equals, folder = word.partition("=")
            is_named = bool(equals) and "/" not in name  # else the sign is part of the folder's path
            path = Path(folder if is_named else word)
            name = name if is_named else path.resolve().name
            if not re.fullmatch(r"[\w.-]+", name) or (is_named and not folder):
                raise UsageError(f"--adapter-path {word!r} is not of the form NAME=FOLDER")
            if name in found:
                raise UsageError(f"two adapters are named {name!r}", hint="name them: --adapter-path NAME=FOLDER")
            found[name] = path
        return found


def _check_adapter_format(name: str) -> None:
    if name not in ADAPTER_FORMATS:
        raise UsageError(f"unknown --adapter-format {name!r}, {nearest(name, ADAPTER_FORMATS)}")


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
