"""The float model as a run sees it: its files and its skeleton, through the rotations that it is rotated by."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantcli.algorithms import Step
from quantcli.errors import InputError
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.conversion import as_in_model
from quantcli.models.dequantized import as_float, float_kind
from quantcli.models.layout import Layout, find_layout, head_size
from quantcli.models.online import OnlineRotations, refuse_online, rotate_inputs
from quantcli.models.opened import open_checkpoint
from quantcli.models.rotate import RotatedCheckpoint, refuse_unrotatable, rotate
from quantcli.models.skeleton import build_skeleton, check_counts, check_tensors, disk_name, first_names, load_config
from quantcli.models.source import locate_model
from quantcli.pipelines.planning.plan import is_trained
from quantcli.tensors.hadamard import Rotation

__all__ = ["FloatModel", "open_model"]


@dataclass(frozen=True)
class FloatModel:
    """A checkpoint and what was found in it."""

    folder: Path
    config: Any
    """transformers' own."""
    checkpoint: Checkpoint
    skeleton: Any
    """On the meta device."""
    layout: Layout
    online: OnlineRotations | None
    """Rotations that the weights expect at run time."""
    tied: bool
    """Whether head and embedding are one matrix in the files."""
    dequantized: str | None = None
    """What its weights are dequantized from as they are read."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the first linear."""
        first = disk_name(f"{self.layout.linears[0]}.weight", self.skeleton, self.checkpoint.entries)
        return self.checkpoint.entries[first].dtype if first is not None else torch.float32


def open_model(name: str, rotation: Step | None, *, trust_remote_code: bool) -> FloatModel:
    """Opens a checkpoint; nothing of it is read but headers and configuration.

    Args:
        name: The model's folder, or one that another command has written.
        rotation: The transform that rotates it.
        trust_remote_code: Whether code beside the model may run.

    Raises:
        InputError: it is not a model, is quantized already, or cannot be rotated.
    """
    folder = locate_model(name)
    checkpoint = open_checkpoint(folder)
    kind = float_kind(checkpoint.config)
    if kind is not None:
        checkpoint = as_float(checkpoint)
    _refuse_quantized(checkpoint, folder)
    config = load_config(folder, trust_remote_code)
    check_counts(config, checkpoint.entries, folder)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if rotation is not None:
        config.tie_word_embeddings = False
    skeleton = build_skeleton(folder, config, trust_remote_code)
    checkpoint = as_in_model(checkpoint, skeleton)
    if checkpoint.unknown:
        listed = first_names(checkpoint.unknown)
        raise InputError(
            f"{folder} holds tensors that {type(skeleton).__name__} has no place for: {listed}",
            hint="take them out, or name the class that they are for in config.json",
        )
    layout = _without_shared(find_layout(skeleton), skeleton)
    online = OnlineRotations.of(checkpoint.config)
    if rotation is not None:
        refuse_online(checkpoint.config, folder, "which cannot be taken in twice")
        refuse_unrotatable(skeleton)
        if getattr(rotation.settings, "online", False):
            online = OnlineRotations(rotation.settings.rotate_mode, rotation.settings.rotation_seed)
        checkpoint = _rotated(checkpoint, skeleton, layout, rotation, online)
    if online is not None:
        rotate_inputs(skeleton, layout.linears, online, in_place=True)
    check_tensors(skeleton, checkpoint.entries, folder)
    return FloatModel(folder, config, checkpoint, skeleton, layout, online, tied, kind)


def _refuse_quantized(checkpoint: Checkpoint, folder: Path) -> None:
    found = checkpoint.config.get("quantization_config")
    method = found.get("quant_method", "unknown method") if isinstance(found, dict) else None
    if method is None and any(
        name.endswith((".qweight", ".weight_packed", ".absmax", ".SCB")) for name in checkpoint.entries
    ):
        method = "packed weights"
    if method is not None:
        raise InputError(
            f"{folder} is already quantized ({method}); tensors of float32, float16, bfloat16 or float64 are read",
            hint="quantize the original model instead; of quantized ones, FP8, NVFP4 and MXFP4 are dequantized",
        )


def _without_shared(layout: Layout, skeleton: Any) -> Layout:
    """The layout without linears that are another block's: it is quantized once, for its first user."""
    tied = getattr(skeleton, "all_tied_weights_keys", {})
    return replace(layout, linears=tuple(name for name in layout.linears if f"{name}.weight" not in tied))


def _rotated(
    checkpoint: Checkpoint, skeleton: Any, layout: Layout, step: Step, online: OnlineRotations | None
) -> RotatedCheckpoint:
    """The checkpoint through the rotations of a step; through none as long as they are to be trained."""
    hidden_size, head_dim = skeleton.config.get_text_config().hidden_size, head_size(skeleton)
    if is_trained(step):
        stream, head = Rotation.identity(hidden_size), Rotation.identity(head_dim)
    else:
        stream, head = step.algorithm.run(hidden_size, head_dim, step.settings)
    return rotate(checkpoint, skeleton, layout, stream, [head] * len(layout.blocks), online)
