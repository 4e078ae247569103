"""compressed-tensors checkpoints of the `pack-quantized` layout, as llm-compressor writes and vLLM reads them.

For a linear with K inputs, N outputs, b bits and G groups of g columns:

- weight_packed     [N, ceil(K*b/32)] int32: code - 2**(b-1) as signed numbers, which are shifted back to 0 ... 2**b - 1
  before they are packed: so the codes themselves, along K as one little-endian bit stream (`bitpack`);
- weight_scale      [N, G] float;
- weight_zero_point [ceil(N*b/32), G] int32: zero points, shifted and packed alike along N; only where asymmetric;
- weight_shape      [2] int64: N and K.

Older writers have int8 zero points [N, G] that are not packed, and `weight_g_idx` [K] int32 (`actorder: group`), the
group of each column; compressed-tensors 0.20 took both away, we read them. A signed grid with zero point 0 is our
symmetric grid with the zero in the middle; scales may be negative, readers only multiply by them.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats.bitpack import pack_rows, packed_words, unpack_rows
from quantcli.formats.codec import Codec, Described, Held, require, require_groups, require_scales
from quantcli.scheme import PER_CHANNEL, Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

__all__ = ["CODEC", "METHOD", "PARTS", "pack", "refuse_config", "scheme_of", "unpack"]

METHOD = "compressed-tensors"
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_LAYOUT = "pack-quantized"
_VERSION = "0.20.0"
"""Of the package whose layout this is."""


def pack(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one linear: three, and the zero points where they are not all in the middle by scheme."""
    scheme = tensor.scheme
    if tensor.has_float_zeros:
        raise AssertionError("compressed-tensors holds whole zero points; the plan should have said so")
    stored = {
        "weight_packed": pack_rows(tensor.codes.T, scheme.bits).T.contiguous(),
        "weight_scale": tensor.scale.contiguous(),
        "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        stored["weight_zero_point"] = pack_rows(tensor.zero, scheme.bits)
    elif not bool((tensor.zero == scheme.middle).all()):
        raise AssertionError("a symmetric grid has its zero in the middle")
    return stored


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Reads one linear.

    Args:
        tensors: By the names in `PARTS`; weight_zero_point and weight_g_idx may be missing.
        scheme: From `scheme_of`.

    Raises:
        InputError: a tensor is missing, or they do not fit together.
    """
    sizes = tensors.get("weight_shape")
    if sizes is None or sizes.shape != (2,) or sizes.is_floating_point() or int(sizes.min()) < 1:
        raise InputError(f"weight_shape is {None if sizes is None else sizes.tolist()}, expected outputs and inputs")
    rows, columns = (int(n) for n in sizes)
    groups = scheme.group_count(columns)
    words = require(tensors, "weight_packed", (rows, packed_words(columns, scheme.bits)), torch.int32)
    scales = dict(tensors)
    if (given := tensors.get("weight_scale")) is not None and given.numel() == 1:  # one for the whole matrix
        scales["weight_scale"] = given.reshape(1, 1).expand(rows, groups)
    scale = require_scales(scales, "weight_scale", (rows, groups))
    group = group_index(columns, scheme, words.device)
    index = tensors.get("weight_g_idx")
    if index is not None and bool((index != -1).any()):  # -1 everywhere: in order
        group = require_groups(tensors, "weight_g_idx", columns, groups)
    return QuantizedTensor(
        codes=unpack_rows(words.T, scheme.bits, columns).T.contiguous(),
        scale=scale.contiguous(),
        zero=_zero(tensors, scheme, rows, groups),
        scheme=scheme,
        group=group,
    )


def refuse_config(config: Mapping[str, Any]) -> str | None:
    """Which layout it has that is not read; None where all is `pack-quantized`, or nothing is said."""
    groups = config.get("config_groups")
    found = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    for group in found:
        layout = group.get("format") or config.get("format")
        if layout not in (None, _LAYOUT):
            what = "".join(
                f", {values.get('num_bits')}-bit {values.get('type', 'int')} {key.replace('_', ' ')}"
                for key in ("weights", "input_activations")
                if isinstance(values := group.get(key), Mapping)
            )
            return f"compressed-tensors checkpoint of layout {layout!r}{what}: {_LAYOUT!r} is read"
    return None


def scheme_of(config: Mapping[str, Any], name: str) -> Scheme:
    """The scheme of one packed linear by a `quantization_config`.

    Raises:
        InputError: it quantizes more than weights, or in another layout; or the linear is said to stay float.
    """
    transforms = (config.get("transform_config") or {}).get("config_groups")
    for key, found in (("kv_cache_scheme", config.get("kv_cache_scheme")), ("transform_config", transforms)):
        if found:
            raise InputError(f"its {key} changes what the model computes, only weights are read")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise InputError("quantization_config has no config_groups of schemes")
    if any(_matches(target, name) for target in config.get("ignore") or ()):
        raise InputError("it is packed, but quantization_config ignores it")
    # as its own reader does: names before regular expressions before classes
    targets = [(_rank(target, name), target, group) for group in groups.values() for target in group["targets"]]
    found = sorted((t for t in targets if t[0] is not None), key=lambda t: t[:2])
    if not found:
        raise InputError("it is packed, but no target of quantization_config matches it")
    group = found[0][2]
    layout = group.get("format") or config.get("format")
    weights = group.get("weights") or {}
    if layout != _LAYOUT or weights.get("type", "int") != "int":
        what = f"{weights.get('type', 'int')} weights of layout {layout!r}"
        raise InputError(f"compressed-tensors checkpoint with {what}: integers of layout {_LAYOUT!r} are read")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise InputError(f"its scheme quantizes {key} too, only weights are read")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy not in (None, "group", "channel", "tensor"):
        raise InputError(f"strategy {strategy!r}: group, channel and tensor are read")
    if strategy in ("channel", "tensor") or size is None:
        size = PER_CHANNEL
    return Scheme(
        bits=int(weights.get("num_bits", 8)),
        group_size=int(size),
        symmetric=bool(weights.get("symmetric", True)),
    )


def _zero(tensors: Mapping[str, Tensor], scheme: Scheme, rows: int, groups: int) -> Tensor:
    """The zero points [N, G] uint8."""
    given = tensors.get("weight_zero_point")
    if given is None:
        if not scheme.symmetric:
            raise InputError("weight_zero_point is missing")
        return torch.full((rows, groups), scheme.middle, dtype=torch.uint8)
    if given.dtype == torch.int8:
        signed = given.reshape(1, 1).expand(rows, groups) if given.numel() == 1 else given
        shifted = require({"weight_zero_point": signed}, "weight_zero_point", (rows, groups), torch.int8).int()
        shifted += scheme.middle
        if int(shifted.min()) < 0 or int(shifted.max()) >= scheme.levels:
            raise InputError(f"weight_zero_point is outside of {scheme.bits} bits")
        return shifted.to(torch.uint8)
    words = require(tensors, "weight_zero_point", (packed_words(rows, scheme.bits), groups), torch.int32)
    return unpack_rows(words, scheme.bits, rows)


def _matches(target: str, name: str) -> bool:
    expression = target.removeprefix("re:")
    return target == name if expression == target else re.match(expression, name) is not None


def _rank(target: str, name: str) -> int | None:
    """0 for a name, 1 for a regular expression, 2 for the class that a module of this name has; None for no match."""
    if _matches(target, name):
        return int(target.startswith("re:"))
    return 2 if target == ("Embedding" if "emb" in name.rpartition(".")[2] else "Linear") else None


def _refuse(held: Held) -> str | None:
    scheme = held.scheme
    if not held.ordered:
        return "it holds groups of neighbouring columns only"
    if held.columns % scheme.columns_per_group(held.columns):
        return f"groups of {scheme.group_size} do not divide {held.columns} inputs"
    if held.transposed:
        return "its readers know Linear, not Conv1D"
    return None


def _config(described: Described) -> dict[str, Any]:
    schemes: dict[Scheme, list[str]] = {described.default: ["Linear"]}
    if described.head is not None and described.head not in described.exceptions:
        schemes[described.default].append(described.head)  # a head is no Linear to vLLM: it goes by the name
    for name, scheme in described.exceptions.items():
        schemes.setdefault(scheme, []).append(name)
    return {
        "quant_method": METHOD,
        "format": _LAYOUT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": _group(scheme, targets) for number, (scheme, targets) in enumerate(schemes.items())
        },
        "ignore": list(described.float_linears),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": _VERSION,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    per_row = scheme.group_size == PER_CHANNEL
    return {
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if per_row else "group",
            "group_size": None if per_row else scheme.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": _LAYOUT,
    }


def _packed_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    groups = scheme.group_count(columns)
    words = rows * packed_words(columns, scheme.bits)
    words += 0 if scheme.symmetric else packed_words(rows, scheme.bits) * groups
    return 4 * words + 2 * rows * groups + 16


CODEC = Codec(
    name=METHOD,
    lowest_zero=0,
    refuse=_refuse,
    pack=pack,
    unpack=unpack,
    config=_config,
    packed_bytes=_packed_bytes,
)
