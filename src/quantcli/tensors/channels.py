"""What SmoothQuant knows of an activation: the largest magnitude of each channel, and some rows to try factors on."""

import torch
from torch import Tensor

from quantcli.tensors.finite import all_finite

__all__ = ["Channels"]


class Channels:
    """Gathered batch by batch; what is kept does not grow with the tokens."""

    def __init__(self, columns: int, rows: int, device: torch.device | str = "cpu"):
        """Nothing is seen yet.

        Args:
            columns: K.
            rows: How many rows to keep.
            device: Where.
        """
        self.largest = torch.zeros(columns, device=device)
        """max |x| of each channel, [K] float32, over the tokens that measure."""
        self.tokens = 0
        """How many have."""
        self._judged = torch.zeros(columns, device=device)
        self._rows, self._kept, self._stride, self._passed = rows, [self.largest.new_zeros(0, columns)], 1, 0

    def add(self, inputs: Tensor, *, measures: bool = True, judges: bool = True) -> None:
        """Adds tokens [..., K].

        Args:
            inputs: Of any float dtype.
            measures: Whether they set the largest magnitudes.
            judges: Whether rows are taken from them.
        """
        x = inputs.reshape(-1, inputs.shape[-1])
        if not len(x):
            return
        top = x.abs().amax(0).float()
        if measures:
            self.largest = torch.maximum(self.largest, top)
            self.tokens += len(x)
        if judges:
            self._judged = torch.maximum(self._judged, top)
            # every stride-th of all tokens that came by, wherever batches end
            self._kept.append(x[-self._passed % self._stride :: self._stride].float().clone())
            self._passed += len(x)
            while sum(map(len, self._kept)) > 2 * self._rows:
                self._kept = [torch.cat(self._kept)[::2].clone()]
                self._stride *= 2

    def sample(self) -> Tensor:
        """Rows [R, K] float32, spread evenly over the tokens that judge; at most as many as were asked for."""
        whole = torch.cat(self._kept)
        if len(whole) <= self._rows:
            return whole
        return whole[torch.linspace(0, len(whole) - 1, self._rows).long().to(whole.device)]

    def is_finite(self) -> bool:
        """Whether every value that came by was a number."""
        return all_finite(self.largest) and all_finite(self._judged)
