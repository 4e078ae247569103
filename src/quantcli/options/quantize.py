"""What `quantize` was asked to do."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from quantcli.errors import UsageError, nearest
from quantcli.options.calibration import CalibrationOptions
from quantcli.options.configuration import ConfigurationFile
from quantcli.options.finetune import DTYPES
from quantcli.options.graph import GraphOptions
from quantcli.options.overrides import Override
from quantcli.options.regex import compile_regex
from quantcli.options.simulation import SimulationOptions
from quantcli.scheme import PER_CHANNEL

__all__ = ["FORMATS", "GGUF_TYPES", "GRAPH_READERS", "MIXED_BITS", "PRESETS", "READER_NAMES", "QuantizeOptions"]

PRESETS = ("fast", "balanced", "best", "max")
FORMATS = (
    "gptq", "awq", "compressed-tensors", "int-quantized", "float-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "bnb", "bnb-int8", "gguf", "float",
)  # fmt: skip
ACTIVATIONS = ("dynamic", "static", "float")
KV_CACHES = ("fp8",)
READER_NAMES = ("transformers", "gptqmodel", "vllm", "sglang", "peft", "genai", "onnxruntime", "llama.cpp", "quantcli")
GRAPH_READERS = ("genai", "onnxruntime", "quantcli")
"""Those of the readers that open ONNX graphs."""
MIXED_BITS = (2, 3, 4, 8)
GGUF_TYPES = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k", "q8_0",
)  # fmt: skip
"""llama.cpp's mixes of block types."""


@dataclass(frozen=True)
class QuantizeOptions:
    """What `quantcli quantize` was asked to do."""

    model: str
    """Model to quantize: a checkpoint folder, an output folder of an earlier command, a hub id; or an .onnx file or a
    folder with one."""
    output: Path
    """Folder to write."""
    algorithm: str | None = None
    """Algorithm, or transforms, a rounder and a trainer joined by commas, as awq,gptq,distill; `quantcli algorithms`
    lists them. Default: what the preset says, gptq for balanced."""
    backend: str | None = None
    """External package that does the work instead of our own code, as `quantcli backends` lists them; -a is then one of
    its methods. The result is verified, scored and kept as ours is."""
    timeout: float | None = None
    """Time that --backend may take, as 90s, 30m or 2h."""
    preset: str | None = None
    """fast: kquant without data; balanced: gptq with static act-order and a weighted grid; best: awq's scaling, then
    that, then scale refit and coordinate descent; max: best, then distill. With -a, the preset's settings of that
    rounder. Default: balanced."""
    float_model: str | None = None
    """The float model to learn from, where -a distill trains a folder that is quantized already."""
    settings: dict[str, str] = field(default_factory=dict)
    """Further options of the algorithms, as `quantcli algorithms NAME` lists them; NAME.KEY where two have one."""
    config: ConfigurationFile | None = None
    """JSON file of a pass, as {"type": "GptqQuantizer", "bits": 4}, or of a workflow with passes, as Olive has them;
    flags beside it win. Which types and keys: docs/configurations.md."""
    bits: int | None = None
    """Bits per weight. Default: 4; 8 for llm-int8, dynamic and static."""
    group_size: int | None = None
    """Input columns that share a scale; -1 is one scale per output row. Default: 64; for -a awq 128, where that divides
    the columns of every linear; -1 for llm-int8."""
    symmetric: bool | None = None
    """Symmetric grid (zero point fixed in the middle) or asymmetric. Default: sym for gptq and compressed-tensors at
    4 bits and more, which every server reads; else asym, as on ONNX graphs."""
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
    allow_partial: bool = False
    """Go on although less than 95% of the matrix parameters can be quantized."""
    overrides: tuple[Override, ...] = ()
    """Other bits, group_size, sym or (of rtn) clip_ratio for some linears; the last match wins."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """Calibration text."""
    format: str | None = None
    """How linears are stored: gptq (v1), awq (gemm, 4 bits), compressed-tensors (pack-quantized), bnb (bitsandbytes,
    nf4 and fp4), bnb-int8 (its 8 bits, llm-int8), gguf (one file for llama.cpp) or float (dequantized, which every tool
    reads); with activations rounded too int-quantized (W8A8), float-quantized (FP8), nvfp4-pack-quantized or
    mxfp4-pack-quantized. Default: what can hold the result and most of transformers, gptqmodel and vllm open (or all of
    --for): gptq where nothing else is said."""
    activations: str | None = None
    """Of a format that rounds activations: dynamic (scales of the values at hand), static (one scale for each input,
    from calibration text; int- and float-quantized) or float (weights only; nvfp4 and mxfp4). Default: dynamic."""
    kv_cache: str | None = None
    """fp8: store scales, from calibration text, by which keys and values are rounded to FP8 as they enter the cache; in
    the formats of compressed-tensors."""
    gguf_type: str | None = None
    """Types in a GGUF file, by llama.cpp's name of the mix, as q4_k_m: most tensors q4_k, some q6_k; embedding and
    output head with them. Default: by --bits, q4_k_m for 4; with --sym q4_0."""
    readers: tuple[str, ...] = ()
    """Program that has to open the result (repeatable): transformers, gptqmodel, vllm, sglang, peft, genai,
    onnxruntime, llama.cpp or quantcli. Checked before the run; decides format and sym or asym where they are not
    given."""
    correct_earlier: bool = False
    """Let each block also correct the error of the blocks before it, where that lowers its held-out error."""
    dtype: str | None = None
    """Type of the tensors that stay float: keep, float32, float16 or bfloat16. Default: keep, but bfloat16 beside the
    packed linears of a float32 model: servers run that."""
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
        if self.timeout is not None and self.backend is None:
            raise UsageError(
                "--timeout is for --backend", hint="leave it out: Ctrl-C stops a run, which can go on later"
            )
        if self.preset is not None and self.preset not in PRESETS:
            raise UsageError(f"unknown preset {self.preset!r}, {nearest(self.preset, PRESETS)}")
        for name in self.readers:
            if name not in READER_NAMES:
                raise UsageError(f"unknown reader {name!r} in --for, {nearest(name, READER_NAMES)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}, {nearest(self.dtype, DTYPES)}")
        if self.format is not None and self.format not in FORMATS:
            raise UsageError(f"unknown format {self.format!r}, {nearest(self.format, FORMATS)}")
        if self.activations is not None and self.activations not in ACTIVATIONS:
            raise UsageError(f"unknown --activations {self.activations!r}, {nearest(self.activations, ACTIVATIONS)}")
        if self.kv_cache is not None and self.kv_cache not in KV_CACHES:
            raise UsageError(f"unknown --kv-cache {self.kv_cache!r}, {nearest(self.kv_cache, KV_CACHES)}")
        if self.gguf_type is not None and self.gguf_type not in GGUF_TYPES:
            raise UsageError(f"unknown GGUF type {self.gguf_type!r}, {nearest(self.gguf_type, GGUF_TYPES)}")
        if self.weight_group_size != PER_CHANNEL and self.weight_group_size < 16:
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
    def weight_group_size(self) -> int:
        """Columns that share a scale where no algorithm has a wish of its own."""
        return 64 if self.group_size is None else self.group_size

    @property
    def weight_symmetric(self) -> bool:
        """Whether zero points are fixed in the middle where single weights are rounded."""
        return bool(self.symmetric)

    @property
    def mixes(self) -> bool:
        """Whether the bits of each linear are chosen to meet a target."""
        return self.target_bits is not None or self.target_size is not None

    def matching(self, *names: str) -> list[Override]:
        """Overrides of the linear that has these names, the last of which wins."""
        return [o for o in self.overrides if any(re.search(o.pattern, name) for name in names)]

    def clip_ratio(self, *names: str) -> float | None:
        """What they say of its range."""
        found = [o.clip_ratio for o in self.matching(*names) if o.clip_ratio is not None]
        return found[-1] if found else None

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
