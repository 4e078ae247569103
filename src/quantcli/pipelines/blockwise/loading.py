"""The parts of the float model that a run needs in memory: one block, or what stands outside the blocks."""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantcli.errors import InputError
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.layout import Layout
from quantcli.models.skeleton import disk_name, materialize
from quantcli.tensors.finite import require_finite

__all__ = ["FloatParts", "load_block", "outside_loaded", "read_float"]


class FloatParts(Protocol):
    """A float model that is read part by part; a plan is one."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        ...

    @property
    def checkpoint(self) -> Checkpoint:
        """Its tensors."""
        ...

    @property
    def skeleton(self) -> Any:
        """The model on the meta device."""
        ...

    @property
    def layout(self) -> Layout:
        """Its parts."""
        ...

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What blocks run in."""
        ...

    @property
    def replaced(self) -> Set[str]:
        """Names on disk of the tensors that codes take the place of."""
        ...

    def float_dtype(self, stored: torch.dtype) -> torch.dtype:
        """What a tensor that stays float is written in."""
        ...


def read_float(plan: FloatParts, disk: str) -> Tensor:
    """A tensor of the file in the dtype and on the device that blocks run in; as it will be written, if it stays float.

    Raises:
        InputError: it holds NaN or infinity.
    """
    tensor = plan.checkpoint.read(disk)
    require_finite(tensor, disk)
    if tensor.is_floating_point():
        if disk not in plan.replaced:
            tensor = tensor.to(plan.float_dtype(tensor.dtype))
        tensor = tensor.to(plan.dtype)
    return tensor.to(plan.device)


def load_block(plan: FloatParts, number: int) -> Any:
    """A block with its float weights.

    Raises:
        InputError: the files lack a tensor of it.
    """
    path = plan.layout.blocks[number]
    block = deepcopy(plan.skeleton.get_submodule(path))
    tensors = {}
    for name in block.state_dict():
        disk = disk_name(f"{path}.{name}", plan.skeleton, plan.checkpoint.entries)
        if disk is None:
            raise InputError(f"tensor {path}.{name} is missing from {plan.folder}")
        tensors[name] = read_float(plan, disk)
    materialize(block, tensors)
    _move_buffers(block, plan.device)
    return block


@contextmanager
def outside_loaded(plan: FloatParts, *, head: bool = False) -> Iterator[None]:
    """The skeleton with the tensors outside its blocks in place, the output head's only where asked.

    Their memory is given back afterwards.
    """
    skeleton, layout = plan.skeleton, plan.layout
    inside = tuple(path + "." for path in layout.blocks)
    head_weight = f"{layout.head}.weight"
    tensors = {
        name: read_float(plan, disk)
        for name in skeleton.state_dict()
        if not name.startswith(inside)
        and (disk := disk_name(name, skeleton, plan.checkpoint.entries))
        and (head or name != head_weight)
    }
    if head and layout.head is not None and head_weight not in tensors:  # tied
        tensors[head_weight] = tensors[f"{layout.embedding}.weight"]
    materialize(skeleton, tensors)
    _move_buffers(skeleton, plan.device)
    try:
        yield
    finally:
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            setattr(skeleton.get_submodule(module), leaf, nn.Parameter(tensor.to("meta"), False))


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and not buffer.is_meta:
                child._buffers[name] = buffer.to(device)
