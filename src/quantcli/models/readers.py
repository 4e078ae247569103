"""How the linears of each `quant_method` are found and read: one table, which `load` and `inspect` go by."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantcli.errors import InputError, UsageError
from quantcli.formats import (
    auto_round,
    awq,
    bnb,
    bnb_int8,
    codes_and_scales,
    compressed_config,
    compressed_tensors,
    fp8,
    gguf,
    gptq,
    olive,
)
from quantcli.formats.bitpack import packed_words
from quantcli.models.block_linear import BlockLinear, block_size
from quantcli.models.checkpoint import Checkpoint, TensorEntry
from quantcli.models.codebook_linear import CodebookLinear
from quantcli.models.float_linear import FloatLinear
from quantcli.models.int8_linear import Int8Linear
from quantcli.models.linear import PackedLinear, QuantizedLinear
from quantcli.scheme import PER_CHANNEL, ActivationScheme, Scheme
from quantcli.tensors.activations import InputRounding
from quantcli.tensors.block_types import BLOCK_TYPES, scheme_of
from quantcli.tensors.codebook import VALUES
from quantcli.tensors.quantized import QuantizedTensor
from quantcli.tensors.vectorwise import SCHEME

__all__ = ["READERS", "Reader", "find_reader", "not_in_graphs", "packed_names", "read_packed", "reader_of"]

_GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True)
class Reader:
    """One `quant_method`: its tensors are named MODULE.PART."""

    what: str
    """What of it is read, in words."""
    marks: tuple[str, ...]
    """Parts of which every packed module has one, and no other module."""
    parts: tuple[str, ...]
    """All parts that it may have, `bias` aside."""
    read: Callable[[Mapping[str, Any], str, dict[str, Tensor], Tensor | None, bool], QuantizedLinear]
    """(quantization_config, module name, tensors by part, bias, cache) -> layer."""
    linear: Callable[[Mapping[str, Any], str, Mapping[str, TensorEntry]], tuple[Scheme, int, int]]
    """(quantization_config, module name, headers by part) -> scheme, outputs N, inputs K."""
    uncounted: tuple[str, ...] = ()
    """Parts that are left out of the stored size: column indexes repeat their order."""
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    """What of a quantization_config is not read, in words; None where all is."""
    not_in_graphs: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    """Why ONNX's nodes for quantized weights cannot hold what a quantization_config says; None where they can."""
    scales: str | None = None
    """The part that holds the scales, beside the codes and in floats; None where there is none such."""
    scales_by_output: bool = False
    """Whether that is [N, G], not [G, N]."""


def reader_of(checkpoint: Checkpoint) -> Reader:
    """The reader of a quantized checkpoint.

    Raises:
        InputError: its method is none that we read.
    """
    config = checkpoint.config["quantization_config"]
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in READERS:
        *most, last = (reader.what for reader in (*READERS.values(), _INT8))
        raise InputError(
            f"{checkpoint.folder} is quantized with quant_method {method!r}: {', '.join(most)} and {last} are read",
            hint="give the float model that it was made from",
        )
    reader = _INT8 if _is_int8(config) else READERS[str(method)]
    why = reader.refuse(config)
    if why is not None:
        raise InputError(f"{checkpoint.folder}: {why}", hint="give the float model that it was made from")
    return reader


def find_reader(config: Any) -> Reader | None:
    """The reader of what a quantization_config says; None where none of ours reads it."""
    if not isinstance(config, Mapping):
        return None
    reader = _INT8 if _is_int8(config) else READERS.get(str(config.get("quant_method")))
    return reader if reader is not None and reader.refuse(config) is None else None


def _is_int8(config: Mapping[str, Any]) -> bool:
    """One method, two layouts."""
    return config.get("quant_method") == "bitsandbytes" and bool(config.get("load_in_8bit"))


def not_in_graphs(checkpoint: Checkpoint) -> str | None:
    """Why no ONNX graph of ours holds a checkpoint; None where one does, or where it is float.

    Raises:
        InputError: see `reader_of`.
    """
    config = checkpoint.config.get("quantization_config")
    return None if config is None else reader_of(checkpoint).not_in_graphs(config)


def read_packed(checkpoint: Checkpoint, name: str, *, cache: bool = False) -> QuantizedLinear:
    """One quantized linear (or embedding).

    Args:
        checkpoint: An opened folder whose config has a `quantization_config`.
        name: Module name as in the tensor names, without `.qweight` and the like.
        cache: As in `load`.

    Raises:
        InputError: format, scheme or shapes are not what we read; the message names the linear.
    """
    reader = reader_of(checkpoint)
    parts = (*reader.parts, "bias")
    tensors = {p: checkpoint.read(f"{name}.{p}") for p in parts if f"{name}.{p}" in checkpoint}
    bias = tensors.pop("bias", None)
    try:
        return reader.read(checkpoint.config["quantization_config"], name, tensors, bias, cache)
    except (InputError, UsageError, KeyError) as error:
        raise InputError(f"{checkpoint.folder}: linear {name}: {error}") from error


def packed_names(checkpoint: Checkpoint, reader: Reader) -> list[str]:
    """The modules that are packed, by name."""
    ends = tuple(f".{mark}" for mark in reader.marks)
    return sorted({name[: -len(end)] for name in checkpoint.entries for end in ends if name.endswith(end)})


def _read_gptq(
    config: Mapping[str, Any], name: str, tensors: dict[str, Tensor], bias: Tensor | None, cache: bool
) -> PackedLinear:
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if layout not in _GPTQ_VERSIONS:
        raise InputError(f"GPTQ checkpoint of layout {layout!r}: {', '.join(_GPTQ_VERSIONS)} are read")
    scheme = _gptq_scheme(config, name)
    return PackedLinear(tensors, scheme, bias=bias, version=_GPTQ_VERSIONS[layout], cache=cache)


def _gptq_scheme(config: Mapping[str, Any], name: str) -> Scheme:
    embedding = (config.get("quantcli") or {}).get("embedding")
    if embedding is not None and embedding["name"] == name:
        return Scheme(embedding["bits"], embedding["group_size"], embedding["sym"])
    scheme = gptq.scheme_of(config, name)
    if scheme is None:
        raise InputError("it is packed, but quantization_config says that it stays float")
    return scheme


def _gptq_linear(config: Mapping[str, Any], name: str, entries: Mapping[str, TensorEntry]) -> tuple[Scheme, int, int]:
    scheme = _gptq_scheme(config, name)
    words, rows = entries["qweight"].shape
    index = entries.get("g_idx")
    columns = index.shape[0] if index is not None else words * 32 // scheme.bits
    if packed_words(columns, scheme.bits) != words:
        columns = words * 32 // scheme.bits
    return scheme, rows, columns


def _read_awq(
    config: Mapping[str, Any], name: str, tensors: dict[str, Tensor], bias: Tensor | None, cache: bool
) -> PackedLinear:
    return PackedLinear.from_quantized(awq.unpack(tensors, awq.scheme_of(config)), bias=bias, cache=cache)


def _awq_linear(config: Mapping[str, Any], name: str, entries: Mapping[str, TensorEntry]) -> tuple[Scheme, int, int]:
    scheme = awq.scheme_of(config)
    columns, words = entries["qweight"].shape
    return scheme, words * (32 // scheme.bits), columns


def _read_auto_round(
    config: Mapping[str, Any], name: str, tensors: dict[str, Tensor], bias: Tensor | None, cache: bool
) -> PackedLinear:
    read = _read_gptq if auto_round.packing_of(config) == "gptq" else _read_awq
    return read(auto_round.as_packed(config, name), name, tensors, bias, cache)


def _auto_round_linear(
    config: Mapping[str, Any], name: str, entries: Mapping[str, TensorEntry]
) -> tuple[Scheme, int, int]:
    linear = _gptq_linear if auto_round.packing_of(config) == "gptq" else _awq_linear
    return linear(auto_round.as_packed(config, name), name, entries)


def _refuse_auto_round(config: Mapping[str, Any]) -> str | None:
    if auto_round.packing_of(config) is None:
        known = ", ".join(auto_round.PACKINGS)
        return f"auto-round checkpoint of layout {config.get('packing_format')!r}: {known} are read"
    return None


def _read_bnb(
    config: Mapping[str, Any], name: str, tensors: dict[str, Tensor], bias: Tensor | None, cache: bool
) -> CodebookLinear:
    return CodebookLinear(tensors, bias=bias, cache=cache)


def _bnb_linear(config: Mapping[str, Any], name: str, entries: Mapping[str, TensorEntry]) -> tuple[Scheme, int, int]:
    """As one row: the shape is no header."""
    codebook = config.get("bnb_4bit_quant_type", "fp4")
    return Scheme(4, 64, codebook=codebook if codebook in VALUES else "fp4"), 1, 2 * entries["weight"].size_bytes


def _refuse_bnb(config: Mapping[str, Any]) -> str | None:
    if not config.get("load_in_4bit", True):
        return "bitsandbytes checkpoint of neither 4 nor 8 bits"
    return None


def _read_int8(
    config: Mapping[str, Any], name: str, tensors: dict[str, Tensor], bias: Tensor | None, cache: bool
) -> Int8Linear:
    return Int8Linear(tensors, bnb_int8.threshold_of(config), bias=bias, cache=cache)


def _int8_linear(config: Mapping[str, Any], name: str, entries: Mapping[str, TensorEntry]) -> tuple[Scheme, int, int]:
    rows, columns = entries["weight"].shape
    return SCHEME, rows, columns


def _read_compressed_tensors(
    config: Mapping[str, Any], name: str, tensors: dict[str, Tensor], bias: Tensor | None, cache: bool
) -> QuantizedLinear:
    scheme = compressed_config.scheme_of(config, name)
    packed = compressed_config.layout_of(config, name) == compressed_config.INTEGER_LAYOUT
    tensor = (compressed_tensors if packed else codes_and_scales).unpack(tensors, scheme)
    return _rounding(tensor, compressed_config.activations_of_linear(config, name), tensors, bias, cache)


def _rounding(
    tensor: QuantizedTensor,
    activations: ActivationScheme | None,
    tensors: Mapping[str, Tensor],
    bias: Tensor | None,
    cache: bool,
) -> QuantizedLinear:
    """A linear that rounds what it reads, where there is a scheme for that."""
    layer: QuantizedLinear
    if tensor.codebook is None:
        layer = PackedLinear.from_quantized(tensor, bias=bias, cache=cache)
    else:
        layer = FloatLinear(tensor, bias=bias, cache=cache)
    if activations is not None:
        zero = None if activations.symmetric else tensors.get("input_zero_point")
        stored = tensor.input_scale if activations.stored else None
        if stored is None and activations.stored and (given := tensors.get("input_scale")) is not None:
            stored = given.reshape(-1).float()  # beside packed integers
        layer.rounding = InputRounding(activations, stored, zero)
    return layer


def _compressed_tensors_linear(
    config: Mapping[str, Any], name: str, entries: Mapping[str, TensorEntry]
) -> tuple[Scheme, int, int]:
    scheme, scales = compressed_config.scheme_of(config, name), entries.get("weight_scale")
    if "weight" in entries:
        return scheme, *_matrix(entries["weight"])
    rows, words = _matrix(entries["weight_packed"])
    if compressed_config.layout_of(config, name) != compressed_config.INTEGER_LAYOUT:
        return scheme, rows, 2 * words
    if scheme.group_size == PER_CHANNEL or scales is None:  # to the word: weight_shape is no header
        return scheme, rows, words * 32 // scheme.bits
    return scheme, rows, scales.shape[1] * scheme.group_size


def _matrix(entry: TensorEntry) -> tuple[int, int]:
    if len(entry.shape) != 2:
        raise InputError(f"weight has shape {list(entry.shape)}, expected 2 axes")
    return entry.shape[0], entry.shape[1]


def _not_in_graphs(config: Mapping[str, Any]) -> str | None:
    """Small floats have no evenly spaced levels, and graphs would leave activations as they are."""
    groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, Mapping)]
    if any((g.get("weights") or {}).get("type") == "float" for g in groups):
        return "FP8 and FP4 levels are not evenly spaced"
    if any(g.get("input_activations") for g in groups) or config.get("kv_cache_scheme"):
        return "its activations are rounded, which no graph of ours does"
    return None


def _read_fp8(
    config: Mapping[str, Any], name: str, tensors: dict[str, Tensor], bias: Tensor | None, cache: bool
) -> QuantizedLinear:
    tensor = codes_and_scales.unpack(fp8.as_scales(tensors), fp8.scheme_of(config, tensors))
    return _rounding(tensor, fp8.activations_of(config), tensors, bias, cache)


def _fp8_linear(config: Mapping[str, Any], name: str, entries: Mapping[str, TensorEntry]) -> tuple[Scheme, int, int]:
    return fp8.scheme_of(config, entries), *_matrix(entries["weight"])


def _read_olive(
    config: Mapping[str, Any], name: str, tensors: dict[str, Tensor], bias: Tensor | None, cache: bool
) -> PackedLinear:
    tensor = olive.unpack(tensors, olive.scheme_of(config, name))
    return PackedLinear.from_quantized(tensor, bias=bias, cache=cache)


def _olive_linear(config: Mapping[str, Any], name: str, entries: Mapping[str, TensorEntry]) -> tuple[Scheme, int, int]:
    scheme = olive.scheme_of(config, name)
    rows, stored = entries["qweight"].shape
    return scheme, rows, stored * 8 // scheme.bits


def _read_gguf(
    config: Mapping[str, Any], name: str, tensors: dict[str, Tensor], bias: Tensor | None, cache: bool
) -> BlockLinear:
    return BlockLinear(tensors[gguf.PART], config["types"][name], bias=bias, cache=cache)


def _gguf_linear(config: Mapping[str, Any], name: str, entries: Mapping[str, TensorEntry]) -> tuple[Scheme, int, int]:
    kind = config["types"][name]
    rows, size = entries[gguf.PART].shape
    columns_per_block, block_bytes = block_size(kind)
    columns = size // block_bytes * columns_per_block
    if kind in BLOCK_TYPES:
        return scheme_of(kind), rows, columns
    bits = re.search(r"\d", kind)
    return Scheme(int(bits[0]) if bits else 4, 32, block_type=kind), rows, columns


READERS: Mapping[str, Reader] = {
    "gptq": Reader(
        "gptq (v1, v2)", ("qweight",), gptq.PARTS, _read_gptq, _gptq_linear, uncounted=("g_idx",), scales="scales"
    ),
    "awq": Reader("awq (gemm)", ("qweight",), ("qweight", "qzeros", "scales"), _read_awq, _awq_linear, scales="scales"),
    compressed_config.METHOD: Reader(
        "compressed-tensors",
        ("weight_scale",),
        tuple(dict.fromkeys((*compressed_tensors.PARTS, *codes_and_scales.PARTS))),
        _read_compressed_tensors,
        _compressed_tensors_linear,
        uncounted=("weight_g_idx", "weight_shape"),
        refuse=compressed_config.refuse_config,
        not_in_graphs=_not_in_graphs,
        scales="weight_scale",
        scales_by_output=True,
    ),
    fp8.METHOD: Reader(
        "fp8",
        fp8.MARKS,
        fp8.PARTS,
        _read_fp8,
        _fp8_linear,
        refuse=fp8.refuse_config,
        not_in_graphs=lambda config: "FP8 levels are not evenly spaced",
    ),
    olive.METHOD: Reader("olive", ("qweight",), olive.PARTS, _read_olive, _olive_linear),
    auto_round.METHOD: Reader(
        "auto-round (auto_gptq, auto_awq)",
        ("qweight",),
        gptq.PARTS,
        _read_auto_round,
        _auto_round_linear,
        uncounted=("g_idx",),
        refuse=_refuse_auto_round,
    ),
    "bitsandbytes": Reader(
        "bitsandbytes (nf4, fp4)",
        ("weight.absmax",),
        bnb.PARTS,
        _read_bnb,
        _bnb_linear,
        refuse=_refuse_bnb,
        not_in_graphs=lambda config: "nf4 and fp4 levels are not evenly spaced",
    ),
    "gguf": Reader(
        "gguf",
        (gguf.PART,),
        (gguf.PART,),
        _read_gguf,
        _gguf_linear,
        not_in_graphs=lambda config: "GGML's block types have scales of two levels and minimums",
    ),
}
"""By `quant_method`."""
_INT8 = Reader(
    "bitsandbytes (LLM.int8())",
    ("SCB",),
    bnb_int8.PARTS,
    _read_int8,
    _int8_linear,
    uncounted=("weight_format",),
    not_in_graphs=lambda config: "LLM.int8() computes outlier columns in 16 bits",
)
