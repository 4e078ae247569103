"""A checkpoint seen through a rotation: each tensor is rotated when it is read, and nothing is ever whole in memory.

Which tensor plays which part is a table by model type. Models are refused where a rotation cannot pass: LayerNorm
subtracts the mean, and a norm between a linear and the residual stream (Gemma 2 and 3) has a gain that would have to
rotate along.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.layout import Layout, head_size
from quantcli.models.online import OnlineRotations, down_linears
from quantcli.models.skeleton import disk_name
from quantcli.tensors.hadamard import Rotation

__all__ = ["Part", "RotatedCheckpoint", "refuse_unrotatable", "rotate"]

_BEFORE_ATTENTION, _BEFORE_MLP = "input_layernorm", "post_attention_layernorm"
# last part of the name of a linear: the norm whose output it reads
_READERS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), _BEFORE_ATTENTION),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"), _BEFORE_MLP),
    **dict.fromkeys(("gate", "shared_expert_gate"), _BEFORE_MLP),  # routers
}
_WRITERS = ("o_proj", "down_proj", "w2")
_ROTATABLE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "mixtral", "qwen2_moe", "qwen3_moe")
_ROWS = 4096
_OFFSET = ("gemma",)
"""Norms that multiply by 1 + weight."""


@dataclass(frozen=True)
class Part:
    """What happens to one tensor."""

    gain: str | None = None
    """Norm on disk whose gain is multiplied into the columns."""
    rotate_columns: bool = False
    """W Q: it reads the residual stream, or is the embedding."""
    rotate_rows: bool = False
    """Q^T W: it writes the residual stream."""
    value_rows: int = 0
    """So many rows at the end are value heads."""
    value_columns: bool = False
    """Its columns are value heads."""
    online: Rotation | None = None
    """R4, through which its input comes at run time."""
    is_gain: bool = False
    """A norm's gain, which is multiplied in elsewhere."""
    source: str | None = None
    """The tensor that it is made from, where that has another name."""
    block: int = 0
    """Number of its block, which may have a rotation of value heads of its own."""


def refuse_unrotatable(model: Any) -> None:
    """Says why a model cannot be rotated, where it cannot."""
    kind = model.config.model_type
    if kind in _ROTATABLE:
        return
    names = [type(m).__name__ for m in model.modules()]
    if any(name.endswith("LayerNorm") for name in names):
        why = "its norms subtract the mean, which a rotation of the residual stream does not keep"
    elif any("pre_feedforward_layernorm" in name for name, _ in model.named_modules()):
        why = "it has norms between its linears and the residual stream"
    else:
        why = "it is not known which of its linears read and write the residual stream"
    raise InputError(f"{kind} cannot be rotated: {why}", hint=f"models that can: {', '.join(_ROTATABLE)}")


class RotatedCheckpoint(Checkpoint):
    """The tensors of a checkpoint, rotated as they are read; in the dtypes that they are stored in."""

    def __init__(
        self, base: Checkpoint, parts: Mapping[str, Part], stream: Rotation, heads: Sequence[Rotation], offset: bool
    ):
        """Use `rotate`."""
        entries = dict(base.entries)
        for name, part in parts.items():
            if part.source is not None and name not in entries:
                entries[name] = entries[part.source]
        super().__init__(base.folder, base.config, entries)
        turned = {base.origins[name] for name in parts if name in base.origins}
        self.origins = {name: origin for name, origin in base.origins.items() if origin not in turned}
        self._base, self.parts, self._stream, self._heads, self._offset = base, parts, stream, heads, offset

    def read(self, name: str) -> Tensor:
        """One rotated tensor; products in float64, rounded once."""
        part = self.parts.get(name)
        if part is None:
            return self._base.read(name)
        tensor = self._base.read(part.source or name)
        if part.is_gain:
            return torch.zeros_like(tensor) if self._offset else torch.ones_like(tensor)
        gain = 1.0 if part.gain is None else self._base.read(part.gain).double() + self._offset
        if part.rotate_columns and not part.value_rows:
            for rows in torch.split(tensor, _ROWS):  # in place: a vocabulary is not wanted in float64 at once
                rows.copy_(self._stream.rows(rows.double() * gain))
            return tensor
        return self._turned(tensor.double() * gain, part).to(tensor.dtype).contiguous()

    def read_original(self, name: str) -> Tensor:
        """One tensor as it stands on disk."""
        return self._base.read_original(name)

    def _turned(self, tensor: Tensor, part: Part) -> Tensor:
        """A float64 tensor through all rotations of its part: what is rounded between two is rounded twice."""
        if part.rotate_columns:
            tensor = self._stream.rows(tensor)
        elif part.rotate_rows:
            tensor = self._stream.columns(tensor)
        if part.value_rows:
            heads, first = self._heads[part.block], len(tensor) - part.value_rows
            tensor = torch.cat([tensor[:first], _heads(heads, tensor[first:].movedim(0, -1)).movedim(-1, 0)])
        if part.value_columns:
            tensor = _heads(self._heads[part.block], tensor)
        return tensor if part.online is None else part.online.rows(tensor)

    def turned(self, stream: Rotation, heads: Sequence[Rotation]) -> "RotatedCheckpoint":
        """The same original through other rotations; of value heads, one per block."""
        return RotatedCheckpoint(self._base, self.parts, stream, heads, self._offset)

    @property
    def size_bytes(self) -> int:
        """Bytes of the original."""
        return self._base.size_bytes


def rotate(
    checkpoint: Checkpoint,
    model: Any,
    layout: Layout,
    stream: Rotation,
    heads: Sequence[Rotation],
    online: OnlineRotations | None = None,
) -> RotatedCheckpoint:
    """The checkpoint through the rotations of residual stream and value heads.

    Args:
        checkpoint: The original.
        model: Its skeleton, whose head is not tied: the head takes in the last norm's gain, the embedding does not.
        layout: Its parts.
        stream: Of the hidden size.
        heads: Of a value head's size, one per block.
        online: R4 goes into the weights that its run-time part is in front of.
    """
    entries, kind = checkpoint.entries, model.config.model_type
    parts: dict[str, Part] = {}

    def disk(name: str) -> str:
        found = disk_name(name, model, entries)
        if found is None:
            raise InputError(f"tensor {name} is missing from {checkpoint.folder}")
        return found

    embedding = disk(f"{layout.embedding}.weight")
    parts[embedding] = Part(rotate_columns=True)
    assert layout.head is not None and layout.final_norm is not None
    final = disk(f"{layout.final_norm}.weight")
    parts[final] = Part(is_gain=True)
    own = disk_name(f"{layout.head}.weight", model, entries)
    parts[own or f"{layout.head}.weight"] = Part(gain=final, rotate_columns=True, source=own or embedding)
    values, turned = _value_size(model), set(down_linears(layout.linears))
    for number, path in enumerate(layout.blocks):
        norms = {norm: disk(f"{path}.{norm}.weight") for norm in (_BEFORE_ATTENTION, _BEFORE_MLP)}
        parts |= {norm: Part(is_gain=True) for norm in norms.values()}
        for name, module in model.get_submodule(path).named_modules():
            if getattr(module, "weight", None) is None or module.weight.ndim != 2:
                continue
            leaf = name.rsplit(".", 1)[-1]
            if leaf not in _READERS and leaf not in _WRITERS:
                raise InputError(f"{kind} cannot be rotated: the part of {path}.{name} is not known")
            weight, value_rows = disk(f"{path}.{name}.weight"), values if leaf in ("v_proj", "qkv_proj") else 0
            if leaf in _READERS:
                parts[weight] = Part(
                    gain=norms[_READERS[leaf]], rotate_columns=True, value_rows=value_rows, block=number
                )
            else:
                expects = online if f"{path}.{name}" in turned else None
                parts[weight] = Part(
                    rotate_rows=True,
                    value_columns=leaf == "o_proj",
                    block=number,
                    online=None if expects is None else expects.down(module.weight.shape[1]),
                )
            if getattr(module, "bias", None) is not None:
                parts[disk(f"{path}.{name}.bias")] = Part(
                    rotate_rows=leaf in _WRITERS, value_rows=value_rows, block=number
                )
    return RotatedCheckpoint(checkpoint, parts, stream, heads, kind in _OFFSET)


def _value_size(model: Any) -> int:
    """Rows of the value projection."""
    config = model.config.get_text_config()
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_size(model)


def _heads(rotation: Rotation, x: Tensor) -> Tensor:
    """Each run of columns of x [..., heads * size] through the rotation."""
    return rotation.rows(x.reshape(*x.shape[:-1], -1, rotation.size)).reshape(x.shape)
