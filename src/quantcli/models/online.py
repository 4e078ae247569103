"""Rotations that are computed while the model runs, and the mark on folders whose weights expect them.

QuaRot's R4 (https://arxiv.org/abs/2404.00456): the input x of each linear that ends a feed-forward network becomes
x R4, and its weight W R4, so the product is what it was. R3 turns queries and keys alike, after their position is in,
so that scores stay; it touches no weight and matters only where keys are rounded (`models.simulate`).

No one but our loader computes R4: a folder that needs it is marked, so that others refuse it (`models.marks`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.errors import InputError
from quantcli.models.marks import add_mark, find_mark
from quantcli.tensors.hadamard import Rotation, make_rotation

__all__ = ["OnlineRotations", "RunningRotation", "down_linears", "refuse_online", "rotate_inputs"]

_MARK, _VERSION = "online_rotations", 1
_DOWN = ("down_proj", "w2")


@dataclass(frozen=True)
class OnlineRotations:
    """How R3 and R4 are made: version 1 is `make_rotation` with these and a fixed step in the seed."""

    mode: str
    """hadamard or random, as `make_rotation` takes it."""
    seed: int
    """Of R1; R3 has this + 2, R4 this + 3."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "OnlineRotations | None":
        """What a folder's config.json says; None where its weights expect no rotation.

        Raises:
            InputError: an entry that we do not know how to read.
        """
        entry = find_mark(config, _MARK)
        if entry is None:
            return None
        mode, seed = entry.get("mode"), entry.get("seed")
        if entry.get("version") != _VERSION or mode not in ("hadamard", "random") or type(seed) is not int:
            raise InputError(
                f"config.json: quantcli.{_MARK} is {entry!r}, version {_VERSION} with mode and seed is read",
                hint="it may be of a newer quantcli",
            )
        return cls(mode, seed)

    def keys(self, size: int) -> Rotation:
        """R3 for heads of a size."""
        return make_rotation(size, self.mode, self.seed + 2)

    def down(self, size: int) -> Rotation:
        """R4 for so many inputs."""
        return make_rotation(size, self.mode, self.seed + 3)

    def mark(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of a folder whose weights expect R4."""
        return add_mark(config, _MARK, {"version": _VERSION, **asdict(self)})


def refuse_online(config: Mapping[str, Any], folder: Path, why: str) -> None:
    """Refuses a folder whose weights expect rotations at run time.

    Raises:
        InputError: it is one.
    """
    if OnlineRotations.of(config) is not None:
        raise InputError(
            f"{folder} was made by quarot with online=true: its weights expect rotations at run time, {why}",
            hint="make it again without --set online=true; quarot's offline rotations run everywhere",
        )


def down_linears(linears: tuple[str, ...]) -> list[str]:
    """Those of the linears that end a feed-forward network, whose input R4 turns."""
    return [name for name in linears if name.rpartition(".")[2] in _DOWN]


class RunningRotation:
    """A rotation as a running model needs it: x Q in float32 or better, given back in x's dtype."""

    def __init__(self, rotation: Rotation):
        self._rotation = rotation
        self._cast: dict[tuple[torch.dtype, torch.device], Rotation] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """X Q for x [..., size]."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        if (kind, x.device) not in self._cast:
            self._cast[kind, x.device] = self._rotation.to(kind, x.device)
        return self._cast[kind, x.device].rows(x).to(x.dtype)


class _RotateInput:
    """A forward pre-hook: x R4 in place of x. One object for all modules of a size and all their copies."""

    def __init__(self, rotation: Rotation, in_place: bool):
        self._rotation, self._in_place = RunningRotation(rotation), in_place

    def __deepcopy__(self, memo: dict[int, Any]) -> "_RotateInput":
        return self

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        turned = self._rotation(args[0])
        # a forward that pauses here would hold both
        return (args[0].copy_(turned) if self._in_place else turned, *args[1:])


def rotate_inputs(
    model: nn.Module, linears: tuple[str, ...], online: OnlineRotations, *, in_place: bool = False
) -> None:
    """Hooks R4 in front of the linears whose weights expect it; hooks that come later see what it made.

    Args:
        model: A model, or a skeleton whose blocks are copied and run.
        linears: The linears in its blocks, by path; those of `down_linears` are hooked.
        online: The rotations.
        in_place: Whether x R4 takes x's memory: for inference only.
    """
    hooks: dict[int, _RotateInput] = {}
    for name in down_linears(linears):
        module = model.get_submodule(name)
        columns = int(module.in_features)  # type: ignore[arg-type]
        if columns not in hooks:
            hooks[columns] = _RotateInput(online.down(columns), in_place)
        module.register_forward_pre_hook(hooks[columns])
