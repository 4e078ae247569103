"""Outlier features of one input of linears, which is what LLM.int8() is about."""

from dataclasses import dataclass

__all__ = ["LISTED_CHANNELS", "OutlierReport"]

LISTED_CHANNELS = 32
"""So many are named."""


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
    """Which, the one with most tokens first; at most `LISTED_CHANNELS`."""
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
