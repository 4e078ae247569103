"""Who opens what: a table of the programs that open our folders, as far as each was tried, with its version.

`formats.opening` judges by it. A fact that is new, or no longer true, is changed here and nowhere else. "Loader" says
that the weights arrived where they belong, while the processor at hand has no kernel to run them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantcli.formats.layouts import LAYOUTS

__all__ = ["DEFAULT_READERS", "READERS", "Reader", "Takes"]

_ANY = tuple(range(1, 9))


@dataclass(frozen=True)
class Takes:
    """What a reader takes of one format; what a field does not forbid, it takes."""

    bits: tuple[int, ...] = _ANY
    """Widths of codes."""
    symmetric_only: bool = False
    """Whether zero points have to be in the middle."""
    group_sizes: tuple[int, ...] = ()
    """Those that it has kernels for, -1 for one scale per row; none: any."""
    per_row: bool = True
    """Whether one scale may serve a whole row."""
    whole_groups: bool = False
    """Whether the group size has to divide the columns."""
    word: int = 1
    """Bits that the codes of a row, and of a column, have to be a multiple of."""
    desc_act: bool = True
    """Whether groups may be out of order."""
    head: bool = True
    """Whether the output head may be quantized."""
    head_rows: int = 1
    """What the rows of a quantized head have to be a multiple of."""
    embedding: bool = False
    """Whether the embedding may."""
    experts: bool = True
    """Whether experts may."""
    mixed: bool = True
    """Whether linears may differ in width or group size."""
    fused: bool = False
    """Whether it runs q, k, v and gate, up as one, so that they have to be stored alike."""
    blocks_alike: bool = False
    """Whether the same linears have to be quantized in every block."""
    families: Mapping[str, str] = field(default_factory=dict)
    """Model types that it does not open, and why."""
    silent: tuple[str, ...] = ()
    """Fields against which it does not stop, but computes nonsense."""


@dataclass(frozen=True)
class Reader:
    """A program that opens folders."""

    name: str
    """As in `--for`."""
    version: str
    """What was tried."""
    formats: Mapping[str, Takes]
    """By `--format`, what it takes; the others it does not read, but for those of `untried`."""
    graphs: bool = False
    """Whether it opens ONNX graphs."""
    through: str = ""
    """The command of ours that makes of a checkpoint what it opens."""
    untried: tuple[str, ...] = ()
    """Formats that it says it reads, and that could not be tried."""


_RENAMES = "it renames the model's linears"
_CONV1D = "it cannot put quantized linears in the place of its Conv1D"
_LINEARS_ONLY = Takes(embedding=True)
_BNB = Takes(experts=False)
_GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)

# optimum builds each linear by the scheme of the whole model; a head and experts are left as they were initialized
_TRANSFORMERS_GPTQ = Takes(
    bits=(2, 3, 4, 8),
    group_sizes=_GPTQMODEL_GROUPS,
    word=32,
    per_row=False,
    head=False,
    experts=False,
    mixed=False,
    blocks_alike=True,
    families={"gpt2": _CONV1D},
    silent=("per_row", "head", "experts", "embedding"),
)
_TRANSFORMERS_AWQ = Takes(
    bits=(4,), head=False, experts=False, families={"gpt2": _CONV1D}, silent=("head", "experts", "embedding")
)

_VLLM_GPTQ = Takes(
    bits=(4, 8),  # 8: loader
    symmetric_only=True,
    group_sizes=(-1, 32, 64, 128),
    whole_groups=True,
    desc_act=False,
    head_rows=64,  # it pads the vocabulary to that, and not the scales
    fused=True,
)
_VLLM_AWQ = Takes(bits=(4,), group_sizes=(-1, 32, 64, 128), whole_groups=True, head=False, fused=True)
_VLLM_PACKED = Takes(bits=(2, 3, 4, 8), group_sizes=(-1, 32, 64, 128), whole_groups=True, fused=True)  # 2, 3, 8: loader
_SERVED = {"gptq": _VLLM_GPTQ, "awq": _VLLM_AWQ, "compressed-tensors": _VLLM_PACKED, "float": Takes()}

_CAPTURED = Takes(bits=_ANY[1:], embedding=True)
_BUILT = Takes(
    bits=_ANY[1:],
    embedding=True,
    families=dict.fromkeys(("gpt2", "qwen3_moe", "opt"), "the GenAI model builder does not know it"),
)

# codes, scales and simulated activations are compressed-tensors' own, so its reader takes all that it describes
_ROUNDED = dict.fromkeys(LAYOUTS, Takes())

READERS: Mapping[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader(
            "transformers",
            "5.23.0, with optimum 2.3 and gptqmodel 7.6.0, compressed-tensors 0.20.0, bitsandbytes 0.50.2",
            {
                "gptq": _TRANSFORMERS_GPTQ,
                "awq": _TRANSFORMERS_AWQ,
                # expects zero points that are not packed, where compressed-tensors 0.20 packs them
                "compressed-tensors": Takes(symmetric_only=True),
                **_ROUNDED,
                "bnb": _BNB,
                "bnb-int8": _BNB,
                "float": Takes(),
            },
        ),
        Reader(
            "gptqmodel",
            "7.6.0",
            {
                "gptq": Takes(
                    bits=(2, 3, 4, 8),
                    group_sizes=_GPTQMODEL_GROUPS,
                    word=32,
                    families={"phi3": _RENAMES, "mixtral": _RENAMES},
                    silent=("embedding",),
                ),
                "awq": Takes(
                    bits=(4,), head=False, families={"phi3": _RENAMES, "mixtral": _RENAMES}, silent=("families",)
                ),
                "float": Takes(),
            },
        ),
        Reader(
            "vllm",
            "0.32.0, its CPU build",
            _SERVED | {"int-quantized": Takes(fused=True)},
            untried=tuple(LAYOUTS),  # the CPU build has no kernels for small floats
        ),
        Reader("sglang", "0.5.23, source read, not run", _SERVED, untried=tuple(LAYOUTS)),
        Reader(
            "peft",
            "0.21.2, on what transformers opens",
            {"gptq": _TRANSFORMERS_GPTQ, "bnb": _BNB, "bnb-int8": _BNB, "float": Takes()},
        ),
        Reader(
            "genai",
            "0.18.0",
            {"gptq": _BUILT, "awq": _BUILT, "compressed-tensors": _BUILT, "float": _BUILT},
            graphs=True,
            through="capture-onnx-graph",
        ),
        Reader(
            "onnxruntime",
            "1.32.0",
            {"gptq": _CAPTURED, "awq": _CAPTURED, "compressed-tensors": _CAPTURED, "float": Takes(embedding=True)},
            graphs=True,
            through="capture-onnx-graph --exporter torch",
        ),
        Reader("llama.cpp", "of llama-cpp-python 0.3.36, on its CPU", {"gguf": Takes(embedding=True)}),
        Reader(
            "quantcli",
            "this one",
            dict.fromkeys(
                ("gptq", "awq", "compressed-tensors", *LAYOUTS, "bnb", "bnb-int8", "gguf", "float"), _LINEARS_ONLY
            ),
            graphs=True,
        ),
    )
}
"""By name."""

DEFAULT_READERS = ("transformers", "gptqmodel", "vllm")
"""Whose taste decides the format where none is named."""
