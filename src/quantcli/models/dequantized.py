"""Checkpoints that exist only in small floats, as float ones: each weight is dequantized when it is read.

Sources: FP8 (`quant_method: fp8`), what compressed-tensors stores in FP8, NVFP4 or MXFP4, and MXFP4 as gpt-oss has it.
Of the last, with E experts, N outputs and K inputs:

- NAME_blocks [E, N, K/32, 16] uint8: two codes of E2M1 a byte, the first in the low bits;
- NAME_scales [E, N, K/32] uint8: exponents plus 127;

and NAME is [E, K, N].
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats import compressed_config, fp8
from quantcli.formats.codec import require
from quantcli.models.checkpoint import Checkpoint, MadeEntry, TensorEntry
from quantcli.models.readers import packed_names, read_packed, reader_of
from quantcli.tensors import floats

__all__ = ["MXFP4", "as_float", "float_kind"]

MXFP4 = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
_BIAS = 127


def float_kind(config: Mapping[str, Any]) -> str | None:
    """What small floats a checkpoint consists of, in words; None where it is float, or what is not dequantized."""
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    method = found.get("quant_method")
    if method in (fp8.METHOD, MXFP4):
        return str(method)
    groups = found.get("config_groups")
    if method != compressed_config.METHOD or not isinstance(groups, Mapping) or not groups:
        return None
    kinds = {(g.get("weights") or {}).get("type") for g in groups.values() if isinstance(g, Mapping)}
    return ", ".join(sorted(compressed_config.layouts_of(found))) if kinds == {"float"} else None


def as_float(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with float weights, in the dtype that its configuration names, bfloat16 where it names none.

    Args:
        checkpoint: Of a `float_kind`.

    Raises:
        InputError: a layout that is not read, or tensors that do not fit together.
    """
    config = checkpoint.config
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = {"float16": torch.float16, "float32": torch.float32}.get(str(named), torch.bfloat16)
    made = (_experts if config["quantization_config"]["quant_method"] == MXFP4 else _linears)(checkpoint, dtype)
    gone, entries = made
    kept = {name: entry for name, entry in checkpoint.entries.items() if name not in gone}
    left = {key: value for key, value in config.items() if key != "quantization_config"}
    return Checkpoint(checkpoint.folder, left, kept | entries)


def _linears(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[set[str], dict[str, TensorEntry]]:
    """Names of tensors that go, and entries of those that come."""
    reader, config = reader_of(checkpoint), checkpoint.config["quantization_config"]
    gone = {name for name in checkpoint.entries if compressed_config.is_cache_scale(name)}
    made: dict[str, TensorEntry] = {}
    for name in packed_names(checkpoint, reader):
        parts = {p: checkpoint.entries[f"{name}.{p}"] for p in reader.parts if f"{name}.{p}" in checkpoint}
        gone |= {f"{name}.{part}" for part in parts}
        try:
            _, rows, columns = reader.linear(config, name, parts)
        except (InputError, KeyError) as error:
            raise InputError(f"{checkpoint.folder}: linear {name}: {error}") from error
        made[f"{name}.weight"] = _entry(checkpoint, name, (rows, columns), dtype, partial(_rows, checkpoint, name))
    return gone, made


def _rows(checkpoint: Checkpoint, name: str, first: int, last: int) -> Tensor:
    return read_packed(checkpoint, name).quantized().rows(first, last).dequantize()


def _experts(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[set[str], dict[str, TensorEntry]]:
    gone: set[str] = set()
    made: dict[str, TensorEntry] = {}
    for disk, blocks in checkpoint.entries.items():
        if not disk.endswith(_BLOCKS):
            continue
        name = disk.removesuffix(_BLOCKS)
        scales = checkpoint.entries.get(name + _SCALES)
        if len(blocks.shape) != 4 or scales is None or scales.shape != blocks.shape[:3] or blocks.shape[3] != 16:
            raise InputError(f"{checkpoint.folder}: {disk} of shape {list(blocks.shape)} has no scales that fit it")
        experts, rows, groups, _ = blocks.shape
        gone |= {disk, name + _SCALES}
        made[name] = _entry(checkpoint, disk, (experts, groups * 32, rows), dtype, partial(_stack, checkpoint, name))
    if not made:
        raise InputError(f"{checkpoint.folder}: quantization_config is there, but no tensor ends in {_BLOCKS}")
    return gone, made


def _stack(checkpoint: Checkpoint, name: str, first: int, last: int) -> Tensor:
    """Experts [first, last) as [E, K, N], one after another."""
    blocks, scales = checkpoint.read(name + _BLOCKS), checkpoint.read(name + _SCALES)
    require({"blocks": blocks, "scales": scales}, "blocks", (None, None, None, 16), torch.uint8)
    require({"blocks": blocks, "scales": scales}, "scales", blocks.shape[:3], torch.uint8)
    table, found = floats.values("e2m1"), []
    for number in range(first, last):
        codes = torch.stack([blocks[number] & 15, blocks[number] >> 4], 3).flatten(2)
        weight = torch.ldexp(table[codes.long()], scales[number].int()[..., None] - _BIAS)
        found.append(weight.flatten(1).T)
    return torch.stack(found)


def _entry(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[int, int], Tensor]
) -> MadeEntry:
    like = next(entry for disk, entry in checkpoint.entries.items() if disk == name or disk.startswith(f"{name}."))
    return MadeEntry(like.file, dtype, shape, 0, math.prod(shape) * dtype.itemsize, make, shape)
