"""A packed folder as a model whose scales, norms and biases can be trained; codes stay packed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from quantcli.errors import InputError
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.linear import PackedEmbedding, PackedLinear
from quantcli.models.load import load
from quantcli.models.readers import READERS, Reader, reader_of
from quantcli.models.scaled_product import rounded_in_forward
from quantcli.models.skeleton import disk_name

__all__ = ["Student", "Trained", "open_student", "reader_with_scales"]


@dataclass(frozen=True)
class Trained:
    """A tensor that is trained."""

    disk: str
    """Its name in the files."""
    value: nn.Parameter
    """Float32, as the model takes it."""
    dtype: torch.dtype
    """What it is stored in, and rounded to in every forward."""
    bits: int
    """Of the matrix that it scales; of a norm or a bias, the fewest of any."""
    by_output: bool = False
    """Whether the files hold its transpose."""

    def stored(self) -> Tensor:
        """As the files hold it."""
        value = self.value.detach().to(self.dtype)
        return (value.T if self.by_output else value).contiguous()

    def longest_step(self, learning_rate: float) -> float:
        """Relative to its magnitude, and to the grid."""
        magnitude = float(self.value.detach().abs().mean())
        return magnitude * learning_rate / float(1 << self.bits)


@dataclass(frozen=True)
class Student:
    """A quantized model under training."""

    model: Any
    trained: list[Trained]

    def logits(self, row: Tensor) -> Tensor:
        """[T, V] float32 of one row of tokens [T]."""
        found: Tensor = self.model(input_ids=row[None], use_cache=False).logits
        return found[0].float()

    def recompute(self, blocks: Sequence[str]) -> None:
        """Keeps of each block's forward its input alone, and runs it again on the way back: memory for time."""
        for path in blocks:
            block = self.model.get_submodule(path)
            block.forward = partial(recomputed, block.forward, use_reentrant=False)


def reader_with_scales(checkpoint: Checkpoint) -> Reader:
    """The reader of a quantized folder whose scales lie beside its codes.

    Raises:
        InputError: it is float, or of a format that holds scales otherwise.
    """
    if checkpoint.config.get("quantization_config") is None:
        raise InputError(
            f"distill trains the scales of a quantized model, {checkpoint.folder} is float",
            hint="name a rounder before it: -a gptq,distill",
        )
    reader = reader_of(checkpoint)
    if reader.scales is None:
        able = ", ".join(name for name, r in READERS.items() if r.scales is not None)
        raise InputError(
            f"{checkpoint.folder} is {reader.what}: distill trains scales that stand beside codes, as in {able}",
            hint="quantize the float model with -a gptq,distill",
        )
    return reader


def open_student(folder: Path, device: torch.device, *, trust_remote_code: bool) -> Student:
    """Opens a packed folder; whatever of it is trained takes gradients, and nothing else.

    Raises:
        InputError: it is not quantized, or its scales are not stored one by one.
    """
    checkpoint = Checkpoint.open(folder)
    reader = reader_with_scales(checkpoint)
    model = load(folder, device=device, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.requires_grad_(False)
    vectors = [name for name, p in model.named_parameters() if p.ndim == 1 and p.is_floating_point()]
    trained = list(_scales(model, checkpoint, reader))
    if not trained:
        raise InputError(
            f"{folder}: distill trains scales of integers, its codes are small floats",
            hint="quantize the float model with -a gptq,distill",
        )
    fewest = min(t.bits for t in trained)
    trained += _vectors(model, checkpoint, vectors, fewest)
    for found in trained:
        found.value.requires_grad_(True)
    return Student(model, trained)


def _scales(model: Any, checkpoint: Checkpoint, reader: Reader) -> Iterator[Trained]:
    looked_up = {id(m.packed) for m in model.modules() if isinstance(m, PackedEmbedding)}
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLinear) or id(layer) in looked_up:
            continue
        weight = model.names_on_disk.get(f"{name}.weight", f"{name}.weight")
        disk = f"{weight.removesuffix('.weight')}.{reader.scales}"
        stored = checkpoint.read(disk) if disk in checkpoint else None
        given = layer.scales.T if reader.scales_by_output else layer.scales
        if stored is None or not torch.equal(stored, given.cpu()):
            raise InputError(f"{checkpoint.folder}: the scales of {name} are not stored one by one")
        yield Trained(disk, layer.train_scales(), stored.dtype, layer.bits, reader.scales_by_output)


def _vectors(model: Any, checkpoint: Checkpoint, names: Sequence[str], bits: int) -> Iterator[Trained]:
    """Norms and biases; those that are zero have no magnitude to step by."""
    for name in names:
        module, _, leaf = name.rpartition(".")
        disk = disk_name(name, model, checkpoint.entries)
        value = model.get_parameter(name)
        if disk is None or checkpoint.entries[disk].shape != value.shape or not bool(value.any()):
            continue
        dtype = checkpoint.entries[disk].dtype
        yield Trained(disk, rounded_in_forward(model.get_submodule(module), leaf, dtype), dtype, bits)
