"""One matrix of a plan, of a checkpoint or of a graph."""

from dataclasses import dataclass

from quantcli.report.layer import LayerReport
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

    def report(
        self,
        algorithm: str,
        error: float,
        rtn_error: float,
        seconds: float,
        tokens: int = 0,
        scaled: bool = False,
    ) -> LayerReport:
        """What became of it; see there."""
        return LayerReport(
            name=self.name,
            kind=self.name.rsplit(".", 1)[-1],
            algorithm=algorithm,
            bits=self.scheme.bits,
            group_size=self.scheme.group_size,
            symmetric=self.scheme.symmetric,
            parameters=self.rows * self.columns,
            size_bytes=self.stored_bytes,
            relative_error=error,
            rtn_relative_error=rtn_error,
            tokens=tokens,
            seconds=seconds,
            scaled=scaled,
        )
