"""Shards, one per block and one for the rest: written, read back and compared."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats.codec import Codec
from quantcli.formats.codecs import CODECS
from quantcli.models.skeleton import disk_name
from quantcli.models.writer import CheckpointWriter
from quantcli.pipelines.blockwise.gguf_file import join_to_gguf
from quantcli.pipelines.planning.plan import DTYPES, Plan
from quantcli.pipelines.planning.target import Target
from quantcli.tensors.finite import all_finite, require_finite
from quantcli.tensors.quantized import BlockScales, NestedScale, QuantizedTensor

__all__ = ["ShardWriter"]


class ShardWriter:
    """Writes the tensors of a run: quantized ones packed, the others as they were but for their dtype."""

    def __init__(self, plan: Plan, folder: Path):
        """No shard is written yet.

        Args:
            plan: With the format and the names of all tensors.
            folder: Of the result's model.
        """
        self._plan = plan
        self._writer = CheckpointWriter(folder)
        self._names = _assign(plan)

    def write(
        self,
        number: int,
        results: dict[str, QuantizedTensor],
        edited: dict[str, Tensor],
        added: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes a shard, reads it back and compares: what is exported is what was computed.

        Args:
            number: Of the block; the number behind the last is that of all tensors outside the blocks.
            results: By module path, what was quantized of it.
            edited: By name on disk, tensors that stay float and have changed; those that are written are taken out.
            added: By name on disk, tensors that the model did not have.
        """
        plan = self._plan
        quantized = {t.disk: t for t in plan.targets.values() if t.name in results}
        if plan.embedding is not None and plan.embedding.name in results:
            quantized[plan.embedding.disk] = plan.embedding
        keep = DTYPES.get(plan.options.dtype or "")
        tensors: dict[str, Tensor] = {}
        changed: set[str] = set()
        for target in quantized.values():
            for part, tensor in self._packed(target, results[target.name]).items():
                tensors[f"{target.stem}.{part}"] = tensor
        names = [disk for disk in self._names[number] if disk not in quantized]
        origins = plan.checkpoint.origins
        touched = {origins[disk] for disk in (*quantized, *edited) if disk in origins}
        whole = {origins[disk] for disk in names if disk in origins} - touched
        if plan.gguf is not None:  # its file has an order of its own
            whole = set()
        for original in dict.fromkeys(name for origin in whole for name in origin):
            tensor = plan.checkpoint.read_original(original)
            require_finite(tensor, original)
            tensors[original] = tensor.to(keep) if tensor.is_floating_point() and keep is not None else tensor
        for disk in names:
            if origins.get(disk) in whole:
                continue
            if disk in edited:
                changed.add(disk)
            tensor = edited.pop(disk) if disk in edited else plan.checkpoint.read(disk)
            require_finite(tensor, disk)
            if tensor.is_floating_point() and keep is not None:
                tensor = tensor.to(keep)
            tensors[disk] = tensor
        path = self._writer.write(number, tensors | dict(added or {}))
        tensors = {name: tensors[name] for name in changed} | dict(added or {})
        self._compare(path, list(quantized.values()), results, tensors)

    def finish(self) -> None:
        """Joins the shards to files of the usual names and writes the index; or to one GGUF file."""
        if self._plan.gguf is not None:
            join_to_gguf(self._plan, self._writer.folder)
            return
        self._writer.finish(len(self._names))

    def _compare(
        self, path: Path, targets: list[Target], results: dict[str, QuantizedTensor], changed: dict[str, Tensor]
    ) -> None:
        written = load_file(path)
        for name, tensor in changed.items():
            if not torch.equal(written[name], tensor):
                raise AssertionError(f"{path.name}: {name} reads back other than it was computed")
        for target in targets:
            computed = results[target.name].to("cpu")
            packed = self._packed(target, computed)
            parts = {part: written[f"{target.stem}.{part}"] for part in packed}
            codec = self._codec(target)
            same = (
                torch.equal(parts["weight"], packed["weight"])
                if codec.unpack is None
                else _same(codec.unpack(parts, target.scheme), computed)
            )
            if not same:
                raise AssertionError(f"{path.name}: {target.stem} reads back other than it was computed")

    def _codec(self, target: Target) -> Codec:
        """Embeddings are stored as gptq stores linears; in a GGUF file all are alike."""
        apart = target is self._plan.embedding and self._plan.gguf is None
        return CODECS["gptq"] if apart else self._plan.codec

    def _packed(self, target: Target, result: QuantizedTensor) -> dict[str, Tensor]:
        """What is stored of one linear, by the last part of the name."""
        codec = self._codec(target)
        packed = codec.pack(result.to("cpu"), *([self._plan.float_dtype_of(target)] if codec.takes_dtype else []))
        if codec.unpack is None and target.transposed:
            packed["weight"] = packed["weight"].T.contiguous()
        return packed


def _assign(plan: Plan) -> list[list[str]]:
    """Names on disk of the tensors of each block, and last of all the others."""
    entries = plan.checkpoint.entries
    state = plan.skeleton.state_dict(keep_vars=True)
    taken: set[str] = set()
    units: list[list[str]] = []
    for path in plan.layout.blocks:
        found = []
        for name in state:
            if name.startswith(path + "."):
                disk = disk_name(name, plan.skeleton, entries)
                if disk is None:
                    raise InputError(f"tensor {name} is missing from {plan.folder}")
                if disk not in taken:  # blocks may share tensors
                    found.append(disk)
                    taken.add(disk)
        units.append(found)
    units.append([name for name in entries if name not in taken])
    return units


def _same(read: QuantizedTensor, computed: QuantizedTensor) -> bool:
    parts = (
        "codes", "zero", "scale", "group", "codebook", "nested", "divisor", "input_scale", "minimum", "blocks",
    )  # fmt: skip
    return all(_equal(getattr(read, p), getattr(computed, p)) for p in parts) and all_finite(read.scale)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        # codes for NaN stand in the codebook of FP8
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, NestedScale | BlockScales) and type(a) is type(b):
        return all(_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)
