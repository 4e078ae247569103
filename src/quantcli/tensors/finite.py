"""Whether a tensor holds nothing but finite numbers, and the refusal of one that does not."""

import torch
from torch import Tensor

from quantcli.errors import InputError

__all__ = ["all_finite", "require_finite"]


def all_finite(tensor: Tensor) -> bool:
    """True where no value is NaN or infinite; one pass without temporaries, NaN propagates through both ends."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:  # torch compares no float8
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def require_finite(tensor: Tensor, name: str) -> None:
    """Refuses a tensor of a model's files.

    Raises:
        InputError: it holds NaN or infinity; the message names it.
    """
    if not all_finite(tensor):
        raise InputError(f"tensor {name} holds NaN or infinite values", hint="download the model again")
