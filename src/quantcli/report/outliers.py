"""Outlier features of one input of linears, which is what LLM.int8() is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # graphs whose report holds no outliers need no torch
    from quantcli.tensors.outliers import OutlierCounts

__all__ = ["OutlierReport"]

_LISTED = 32
"""So many channels are named."""


@dataclass(frozen=True)
class OutlierReport:
    """What calibration text showed of one input."""

    linears: list[str]
    """Those that read it."""
    threshold: float
    """Magnitude from which on a value is an outlier."""
    columns: int
    """K, channels of the input."""
    outlier_columns: int
    """Channels in which some token reached the threshold: they are multiplied in 16 bits."""
    channels: list[int]
    """Which, the one with most tokens first; at most 32."""
    tokens: int
    """How many were seen."""
    touched: float
    """Share of the tokens that hold an outlier."""
    most_frequent: float
    """Share of the tokens in which the channel with most is an outlier."""
    largest: float
    """Largest magnitude of all."""
    scaled: bool = False
    """Whether a transform divided the input afterwards."""

    @classmethod
    def of(cls, linears: Sequence[str], counts: OutlierCounts, *, scaled: bool = False) -> OutlierReport:
        """What was counted of the input of these linears."""
        channels, tokens = counts.columns(), max(counts.tokens, 1)
        return cls(
            linears=[*linears],
            threshold=counts.threshold,
            columns=len(counts.hits),
            outlier_columns=len(channels),
            channels=channels[:_LISTED],
            tokens=counts.tokens,
            touched=counts.touched / tokens,
            most_frequent=float(counts.hits.max()) / tokens,
            largest=float(counts.largest.max()),
            scaled=scaled,
        )
