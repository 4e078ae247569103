"""AWQ checkpoints of the `gemm` layout, 4 bits, as AutoAWQ and gptqmodel write them.

For a linear with K inputs, N outputs and G groups of g columns:

- qweight [K, N/8] int32: eight outputs of one input per word, in the order 0 2 4 6 1 3 5 7 from the low bits up;
- qzeros  [G, N/8] int32: the zero points, packed alike and stored as they are;
- scales  [G, N] float16 or bfloat16.

Groups are runs of neighbouring columns and divide K; one scheme holds for all linears. `zero_point: false` stores no
qzeros: the zero is 8. We always write qzeros, which readers of either kind take.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats.codec import Codec, Described, Held, require, require_scales
from quantcli.formats.fused import fused_shards
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

__all__ = ["CODEC", "pack", "scheme_of", "unpack"]

_BITS = 4
_PER_WORD = 32 // _BITS
# output number within a word, from its low bits up
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The three stored tensors of one linear."""
    if tensor.has_float_zeros:
        raise AssertionError("AWQ holds whole zero points; the plan should have said so")
    return {
        "qweight": _pack_words(tensor.codes.T),
        "qzeros": _pack_words(tensor.zero.T),
        "scales": tensor.scale.T.contiguous(),
    }


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme by a `quantization_config`.

    Raises:
        InputError: bits or layout are others than 4-bit gemm.
    """
    bits = config.get("bits", config.get("w_bit", _BITS))
    version = str(config.get("version", config.get("checkpoint_format", "gemm"))).lower()
    if bits != _BITS or version != "gemm":
        raise InputError(f"AWQ checkpoint with {bits} bits and layout {version!r}: 4 bits and 'gemm' are read")
    group_size = config.get("group_size", config.get("q_group_size", 128))
    return Scheme(bits=_BITS, group_size=int(group_size), symmetric=not config.get("zero_point", True))


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Reads one linear.

    Args:
        tensors: qweight, scales and, unless the zero is fixed, qzeros.
        scheme: From `scheme_of`.

    Raises:
        InputError: a tensor is missing, or they do not fit together.
    """
    qweight = require(tensors, "qweight", (None, None), torch.int32)
    columns, rows = qweight.shape[0], qweight.shape[1] * _PER_WORD
    if columns % scheme.columns_per_group(columns):
        raise InputError(f"qweight has {columns} inputs, which groups of {scheme.group_size} do not divide")
    groups = scheme.group_count(columns)
    scales = require_scales(tensors, "scales", (groups, rows))
    if "qzeros" not in tensors and scheme.symmetric:
        zero = torch.full((groups, rows), scheme.middle, dtype=torch.uint8)
    else:
        zero = _unpack_words(require(tensors, "qzeros", (groups, qweight.shape[1]), torch.int32))
    return QuantizedTensor(
        codes=_unpack_words(qweight).T.contiguous(),
        scale=scales.T.contiguous(),
        zero=zero.T.contiguous(),
        scheme=scheme,
        group=group_index(columns, scheme, qweight.device),
    )


def _pack_words(codes: Tensor) -> Tensor:
    """[R, 8 C] uint8 to [R, C] int32."""
    parts = codes.reshape(codes.shape[0], -1, _PER_WORD).to(torch.int32)
    words = torch.zeros(parts.shape[:2], dtype=torch.int32, device=codes.device)
    for place, output in enumerate(_ORDER):
        words |= parts[:, :, output] << (_BITS * place)
    return words


def _refuse(held: Held) -> str | None:
    scheme = held.scheme
    if scheme.bits != _BITS:
        return f"it holds {_BITS} bits, not {scheme.bits}"
    if not held.ordered:
        return "it holds groups of neighbouring columns only"
    if held.rows % _PER_WORD:
        return f"it holds a multiple of {_PER_WORD} outputs, not {held.rows}"
    if held.columns % scheme.columns_per_group(held.columns):
        return f"groups of {scheme.group_size} do not divide {held.columns} inputs"
    if not held.is_default:
        return "all linears have one scheme in it"
    return None


def _config(described: Described) -> dict[str, Any]:
    scheme = described.default
    config = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": _kept_names(described) or None,
        "meta": {"quantizer": [described.producer]},
    }
    if described.excluded:  # gptqmodel looks for the float ones here, also in this format
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in described.excluded}
    return config


def _kept_names(described: Described) -> list[str]:
    """Names of what stays float: within a block, where that says it, since AutoAWQ compares no more of a name.

    SGLang looks for the names of linears that it runs as one.
    """
    shards = {name: (name,) for name in described.excluded} | fused_shards(described.excluded)
    kept: dict[str, None] = {}
    for name, parts in shards.items():
        partly = any(_in_block(part) in other for part in parts for other in described.quantized)
        kept[name if partly else _in_block(name)] = None
    return list(kept)


def _in_block(name: str) -> str:
    return re.sub(r"^.*?\.\d+\.", "", name)


def _packed_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    groups = scheme.group_count(columns)
    return rows // 2 * (columns + groups) + 2 * groups * rows


def _unpack_words(words: Tensor) -> Tensor:
    """[R, C] int32 to [R, 8 C] uint8."""
    out = torch.empty(words.shape[0], words.shape[1], _PER_WORD, dtype=torch.uint8, device=words.device)
    for place, output in enumerate(_ORDER):
        out[:, :, output] = ((words >> (_BITS * place)) & 15).to(torch.uint8)
    return out.view(words.shape[0], -1)


CODEC = Codec(
    name="awq",
    lowest_zero=0,
    refuse=_refuse,
    pack=pack,
    unpack=unpack,
    config=_config,
    packed_bytes=_packed_bytes,
)
