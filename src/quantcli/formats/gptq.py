"""GPTQ v1 checkpoints: `qweight`, `qzeros`, `scales`, `g_idx` per linear, as AutoGPTQ began and gptqmodel writes them.

For a linear with K inputs, N outputs and G groups of g columns:

- qweight [ceil(K*b/32), N] int32: codes packed along K (`bitpack`);
- qzeros  [G, ceil(N*b/32)] int32: zero - 1 packed along N. Readers add the 1 back, some of them to whole words, where a
  stored 2**b - 1 would carry into its neighbour: so zeros are 1 or more here (`LOWEST_ZERO`);
- scales  [G, N] float16;
- g_idx   [K] int32: the group of each column. A group size that does not divide K leaves the last group shorter.

Where K*b or N*b is not a multiple of 32 the last word is padded with zero bits; our loader reads that, gptqmodel asks
for multiples of 32. The v2 variant (`checkpoint_format: gptq_v2`) stores the zero itself; we read both, write v1.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats.bitpack import pack_rows, packed_words, unpack_rows
from quantcli.formats.codec import Codec, Described, Held, require, require_groups, require_scales
from quantcli.formats.fused import fused_shards
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

__all__ = [
    "BITS",
    "CODEC",
    "LOWEST_ZERO",
    "PARTS",
    "check",
    "config_for",
    "pack",
    "packed_bytes",
    "scheme_of",
    "unpack",
]

BITS = (2, 3, 4, 5, 6, 7, 8)
LOWEST_ZERO = 1
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_WRITES_ALIKE = "gptqmodel:7.6.0"
"""The writer whose layout this is: its loader takes zero points off the middle only from a named version of itself."""


def pack(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The four stored tensors of one linear."""
    bits = tensor.scheme.bits
    if tensor.has_float_zeros:
        raise AssertionError("GPTQ holds whole zero points; the plan should have said so")
    zeros = tensor.zero.to(torch.int16) - 1
    if int(zeros.min()) < 0:
        raise AssertionError("GPTQ v1 holds zero points of 1 or more; the scheme should have said so")
    return {
        "qweight": pack_rows(tensor.codes.T, bits),
        "qzeros": pack_rows(zeros.to(torch.uint8), bits).T.contiguous(),
        "scales": tensor.scale.T.contiguous(),
        "g_idx": tensor.group.to(torch.int32, copy=True).contiguous(),  # linears of one input share it
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, version: int = 1) -> QuantizedTensor:
    """Reads one linear back.

    Args:
        tensors: qweight, qzeros, scales and, optionally, g_idx.
        scheme: Its bits and group size; `symmetric` is taken on trust, the stored zeros are used.
        version: 1 stores zero - 1, 2 stores the zero.

    Raises:
        InputError: a tensor is missing, or they do not fit together.
    """
    rows, columns = check(tensors, scheme)
    words, bits, given = tensors["qweight"], scheme.bits, tensors.get("g_idx")
    group = group_index(columns, scheme, words.device) if given is None else given.to(torch.int32)
    zero = unpack_rows(tensors["qzeros"].T.contiguous(), bits, rows)
    if version == 1:
        zero = (zero + 1) & (scheme.levels - 1)
    return QuantizedTensor(
        codes=unpack_rows(words, bits, columns).T.contiguous(),
        scale=tensors["scales"].T.contiguous(),
        zero=zero.contiguous(),
        scheme=scheme,
        group=group,
    )


def check(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
    """(N, K) of one linear, once its tensors are known to fit together: kernels do not check bounds.

    Raises:
        InputError: a tensor is missing, or they do not fit together.
    """
    bits, given = scheme.bits, tensors.get("g_idx")
    words = require(tensors, "qweight", (None, None), torch.int32)
    rows, columns = words.shape[1], len(words) * 32 // bits if given is None else given.numel()
    if not columns:
        raise InputError("g_idx is empty")
    groups = scheme.group_count(columns)
    require(tensors, "qweight", (packed_words(columns, bits), rows), torch.int32)
    require(tensors, "qzeros", (groups, packed_words(rows, bits)), torch.int32)
    require_scales(tensors, "scales", (groups, rows))
    if given is not None:
        require_groups(tensors, "g_idx", columns, groups)
    return rows, columns


def config_for(described: Described) -> dict[str, Any]:
    """The `quantization_config` of config.json, as gptqmodel writes it."""
    default = described.default
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "method": "gptq",
        "format": "gptq",
        "checkpoint_format": "gptq",
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.symmetric,
        "desc_act": described.desc_act,
        "lm_head": described.head is not None,
        "pack_dtype": "int32",
        "meta": {"quantizer": [described.producer, _WRITES_ALIKE]},
    }
    if described.damp_percent is not None:
        config["damp_percent"] = described.damp_percent
    if described.excluded or described.exceptions:
        config["dynamic"] = _rules(described)
    if described.excluded and (alike := _names_in_each_block(described)) is not None:
        config["modules_in_block_to_quantize"] = [alike]
    return config


def _rules(described: Described) -> dict[str, dict[str, Any]]:
    """What holds for single linears, and for those that servers run as one, where their shards agree."""
    rules: dict[str, dict[str, Any] | None] = dict.fromkeys(described.excluded)
    for name, scheme in described.exceptions.items():
        rules[name] = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
    for fused, shards in fused_shards([*described.quantized, *described.excluded]).items():
        if shards[0] in rules and all(s in rules and rules[s] == rules[shards[0]] for s in shards):
            rules[fused] = rules[shards[0]]
    return {f"{'-' if rule is None else '+'}:^{_escape(name)}$": rule or {} for name, rule in rules.items()}


def _names_in_each_block(described: Described) -> list[str] | None:
    """Names within a block of its quantized linears, for transformers, which asks for them; None if blocks differ."""
    inside = [[n.removeprefix(f"{b}.") for n in described.quantized if n.startswith(f"{b}.")] for b in described.blocks]
    return inside[0] if inside and all(names == inside[0] for names in inside) else None


def packed_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    """Bytes of the four stored tensors."""
    groups = scheme.group_count(columns)
    words = packed_words(columns, scheme.bits) * rows + packed_words(rows, scheme.bits) * groups
    return 4 * words + 2 * groups * rows + 4 * columns


def scheme_of(config: Mapping[str, Any], name: str) -> Scheme | None:
    """The scheme of one linear by a `quantization_config`; None where it stays float."""
    bits, group_size, sym = config.get("bits", 4), config.get("group_size", 128), config.get("sym", True)
    for pattern, values in (config.get("dynamic") or {}).items():
        sign, _, expression = pattern.partition(":")
        if sign not in ("+", "-"):
            sign, expression = "+", pattern
        if re.match(expression, name):
            if sign == "-":
                return None
            bits = values.get("bits", bits)
            group_size = values.get("group_size", group_size)
            sym = values.get("sym", sym)
            break
    if int(bits) not in BITS:
        raise InputError(f"bits must be {BITS[0]} to {BITS[-1]} in a GPTQ checkpoint, got {bits}")
    return Scheme(bits=int(bits), group_size=int(group_size), symmetric=bool(sym))


def _refuse(held: Held) -> str | None:
    return None if held.scheme.bits in BITS else f"it holds {BITS[0]} to {BITS[-1]} bits, not {held.scheme.bits}"


def _escape(name: str) -> str:
    return name.replace(".", r"\.")


CODEC = Codec(
    name="gptq",
    lowest_zero=LOWEST_ZERO,
    refuse=_refuse,
    pack=pack,
    unpack=unpack,
    config=config_for,
    packed_bytes=packed_bytes,
)
