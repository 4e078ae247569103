"""QuaRot: rotate the residual stream and the value heads, so that no channel stands out (https://arxiv.org/abs/2404.00456).

With x' = x Q in place of the residual stream x, every linear that reads it becomes W diag(g) Q, with the norm's gain g
taken in, and every linear that writes it Q^T W; an RMS norm without gain does not see a rotation. Value heads rotate
alike, v by R2 and o by its inverse. The float function stays; weights and activations lose their outliers, so that
rounding to few bits hurts less. Q and R2 are Hadamard matrices after random signs, or random rotations.

With `online`, the weights of down_proj also take R4, whose other half is computed in front of it at run time
(`models.online`), where nothing linear could take it in. That spreads the outliers of the gated product, which matter
to quantized activations. R3 on queries and keys is no weight's business: `models.simulate` computes it.

Left out: the rotation across heads in front of o_proj, which would have to run online too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantcli.algorithms import Algorithm

if TYPE_CHECKING:
    from quantcli.tensors.hadamard import Rotation

__all__ = ["ALGORITHM", "QuarotOptions", "rotations"]


@dataclass(frozen=True)
class QuarotOptions:
    """Which rotations."""

    rotate_mode: Literal["hadamard", "random"] = "hadamard"
    """hadamard: entries of one size, after random signs; random: uniform over all rotations."""
    rotation_seed: int = 0
    """Seed of signs and rotations."""
    online: bool = False
    """Rotate the input of every down_proj as the model runs (R4), and queries and keys where keys are rounded (R3): for
    quantized activations and caches. Such a folder runs in quantcli's loader only; others refuse it."""


def rotations(hidden_size: int, head_dim: int, options: QuarotOptions) -> tuple[Rotation, Rotation]:
    """R1 of the residual stream and R2 of every value head."""
    from quantcli.tensors.hadamard import make_rotation

    return (
        make_rotation(hidden_size, options.rotate_mode, options.rotation_seed),
        make_rotation(head_dim, options.rotate_mode, options.rotation_seed + 1),
    )


ALGORITHM = Algorithm(
    name="quarot",
    kind="transform",
    summary="rotate residual stream and value heads so that no channel stands out; alone it writes a float model",
    bits=(2, 3, 4, 5, 6, 7, 8),
    calibration="none",
    options=QuarotOptions,
    run=rotations,
    scope="model",
)
