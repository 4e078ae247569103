"""What makes the channels of a tensor, with the constants that take a factor per channel."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantcli.graphs.walk.channels import constant_of, has_weight, new_constant, weight_rows
from quantcli.graphs.walk.origins import find_origin

__all__ = ["Edit", "Maker", "find_maker"]


@dataclass(frozen=True)
class Edit:
    """A constant that takes the factors."""

    node: ir.Node
    """Its reader."""
    place: int
    """Which of the reader's inputs it is."""
    axis: int
    """Axis of the channels, from the back; a constant that has no such axis is spread over it."""
    inverse: bool = False
    """Whether it divides where the others multiply."""

    def apply(self, factors: np.ndarray) -> None:
        """Multiplies the constant by factors [channels]."""
        value = self.node.inputs[self.place]
        old = constant_of(value)
        assert value is not None and old is not None
        along = factors.reshape(-1, *[1] * (-self.axis - 1))
        new = old.astype(np.float64) * (1 / along if self.inverse else along)
        new_constant(self.node, self.place, new.astype(old.dtype))


@dataclass(frozen=True)
class Maker:
    """What makes a tensor's channels."""

    edits: tuple[Edit, ...]
    """Constants that the channels are proportional to, all of them together."""
    linear: ir.Node | None
    """The linear among their readers, None for a norm or a product with a constant."""
    repeat: int = 1
    """How many neighbours along the tensor's axis are one channel: a Flatten makes a pixel a column of its own."""

    def divide(self, scale: np.ndarray) -> None:
        """Divides the tensor's channels by scale [channels], float64 and positive, in the constants."""
        for edit in self.edits:
            edit.apply(1 / scale)


def find_maker(
    value: ir.Value | None, axis: int, width: int, readers: Collection[ir.Node], shapes: Mapping[str, ir.Shape]
) -> Maker | None:
    """What makes the channels of a tensor; arguments and None as of `walk.origins.find_origin`."""
    origin = find_origin(value, axis, width, readers, shapes)
    if origin is None:
        return None
    node = origin.main.node
    main = Edit(node, origin.main.place, origin.main.axis, origin.inverse)
    if origin.kind == "linear":
        weight = node.inputs[1]
        if not has_weight(node) or weight is None or weight.shape is None:
            return None
        main = Edit(node, 1, weight_rows(node) - len(weight.shape))
    added = (Edit(c.node, c.place, c.axis) for c in origin.added)
    return Maker((main, *added), node if origin.kind == "linear" else None, origin.repeat)
