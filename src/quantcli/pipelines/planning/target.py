"""One matrix of a plan, of a checkpoint or of a graph."""

from dataclasses import dataclass

from quantcli.scheme import Scheme

__all__ = ["HELD_OUT_SHARE", "Target"]

HELD_OUT_SHARE = 8
"""One row in so many is held out where candidates compete."""


@dataclass(frozen=True)
class Target:
    """One matrix that will be quantized."""

    name: str
    """Module path."""
    disk: str
    """Name of its weight in the files."""
    rows: int
    columns: int
    transposed: bool
    """Whether the file holds [K, N] (GPT-2's Conv1D)."""
    scheme: Scheme
    stored_bytes: int
    """What it takes on disk."""
    clip_ratio: float | None = None
    """Of rtn, where an override says it."""

    @property
    def stem(self) -> str:
        """The disk name without `.weight`."""
        return self.disk.removesuffix(".weight")
