"""Outlier features of an activation: which channels hold values of a magnitude that 8 bits cannot serve beside others.

Symbols: X [M, K] activations of M tokens.
"""

import torch
from torch import Tensor

from quantcli.tensors.finite import all_finite

__all__ = ["OutlierCounts"]


class OutlierCounts:
    """Gathered batch by batch; what is kept does not grow with the tokens."""

    def __init__(self, columns: int, threshold: float, device: torch.device | str = "cpu"):
        """Nothing is seen yet.

        Args:
            columns: K.
            threshold: Magnitude from which on a value is an outlier; 0: none is.
            device: Where.
        """
        self.threshold = threshold
        self.tokens = 0
        """How many were seen."""
        self.touched = 0
        """How many of them hold an outlier."""
        self.hits = torch.zeros(columns, dtype=torch.int64, device=device)
        """Tokens with an outlier in a channel, [K]."""
        self.largest = torch.zeros(columns, device=device)
        """Largest magnitude of each channel, [K] float32."""

    def add(self, inputs: Tensor) -> None:
        """Adds tokens [..., K] of any float dtype."""
        magnitude = inputs.reshape(-1, inputs.shape[-1]).abs().float()
        if not len(magnitude):
            return
        self.tokens += len(magnitude)
        self.largest = torch.maximum(self.largest, magnitude.amax(0))
        if self.threshold > 0:
            outlier = magnitude >= self.threshold
            self.hits += outlier.sum(0)
            self.touched += int(outlier.any(1).sum())

    def columns(self) -> list[int]:
        """The channels that hold outliers, the one with most first."""
        order = torch.argsort(self.hits, descending=True, stable=True)
        return [int(k) for k in order if self.hits[k] > 0]

    def is_finite(self) -> bool:
        """Whether every value that came by was a number."""
        return all_finite(self.largest)
