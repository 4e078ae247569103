"""What a walk over blocks gathers of the inputs of linears: second moments, magnitudes of channels, outliers."""

from dataclasses import dataclass

from torch import Tensor

from quantcli.tensors.channels import Channels
from quantcli.tensors.finite import all_finite
from quantcli.tensors.hessian import Moments
from quantcli.tensors.outliers import OutlierCounts

__all__ = ["MOMENTS", "Gathering", "StageMoments"]


@dataclass(frozen=True)
class Gathering:
    """What is gathered of every stage's input."""

    moments: bool = True
    """Second moments, [K, K]."""
    rows: int = 0
    """Rows that are kept beside the largest magnitudes of channels; 0: neither."""
    outliers: float | None = None
    """Magnitude from which on values are counted, if they are."""


MOMENTS = Gathering()
"""What rounders want."""


@dataclass
class StageMoments:
    """What was gathered of one stage's input."""

    train: Moments | None
    """Second moments of the tokens that solvers see."""
    held_out: Moments | None
    """Of those that they do not."""
    channels: Channels | None = None
    """Largest magnitudes of the tokens that solvers see, rows of those that they do not, if there are any."""
    outliers: OutlierCounts | None = None
    """Of all tokens."""

    @property
    def tokens(self) -> int:
        """How many solvers see."""
        found = self.train or self.channels or self.outliers
        return found.tokens if found is not None else 0

    @classmethod
    def begin(cls, like: Tensor, gathering: Gathering, *, holds_out: bool) -> "StageMoments":
        """Of inputs like this one [..., K]; nothing is gathered yet."""
        columns, device = like.shape[-1], like.device
        return cls(
            Moments(columns, device) if gathering.moments else None,
            Moments(columns, device) if gathering.moments and holds_out else None,
            Channels(columns, gathering.rows, device) if gathering.rows else None,
            OutlierCounts(columns, gathering.outliers, device) if gathering.outliers is not None else None,
        )

    def add(self, inputs: Tensor, reference: Tensor | None, *, judges: bool, holds_out: bool) -> None:
        """Adds tokens [..., K].

        Args:
            inputs: Of the quantized stream.
            reference: The same tokens' in the float stream.
            judges: Whether solvers must not see them.
            holds_out: Whether there are such tokens at all.
        """
        target = self.held_out if judges else self.train
        if target is not None:
            target.add(inputs, reference)
        if self.channels is not None:
            self.channels.add(inputs, measures=not judges, judges=judges or not holds_out)
        if self.outliers is not None:
            self.outliers.add(inputs)

    def is_finite(self) -> bool:
        """Whether all inputs were numbers: a glance at K sums instead of a pass over all tokens."""
        known = all(all_finite(part.energies()) for part in (self.train, self.held_out) if part is not None)
        return known and all(part.is_finite() for part in (self.channels, self.outliers) if part is not None)
