"""Checkpoints that say `quant_method: fp8`: FP8 codes with a scale for each block of 128 x 128, or one for the matrix.

- weight           [N, K] float8_e4m3fn;
- weight_scale_inv [ceil(N/128), ceil(K/128)] float: what the codes of a block are multiplied by (DeepSeek, Qwen); or
- weight_scale     [1] or [N, 1] float: the same of a matrix or a row (vLLM);
- input_scale, activation_scale [1]: of activations, where those are rounded by a stored scale.

Blocks of activations are 128 entries of a token.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from quantcli.errors import InputError
from quantcli.scheme import PER_CHANNEL, ActivationScheme, Scheme

__all__ = ["MARKS", "METHOD", "PARTS", "activations_of", "as_scales", "refuse_config", "scheme_of"]

METHOD = "fp8"
MARKS = ("weight_scale_inv", "weight_scale")
PARTS = ("weight", *MARKS, "input_scale", "activation_scale")
_GROUP = 128


class _Shaped(Protocol):
    """A tensor, or what a header says of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def refuse_config(config: Mapping[str, Any]) -> str | None:
    """What of it is not read; None where all is."""
    kinds = config.get("fmt", "e4m3"), config.get("scale_fmt", "float"), config.get("activation_scheme", "dynamic")
    if kinds[0] != "e4m3":
        return f"fp8 checkpoint of {kinds[0]}: e4m3 is read"
    if kinds[1] not in (None, "float", "ue8m0"):
        return f"fp8 checkpoint with scales of {kinds[1]}: float and ue8m0 are read"
    if kinds[2] not in ("dynamic", "static"):
        return f"fp8 checkpoint with activation_scheme {kinds[2]!r}: dynamic and static are read"
    return None


def scheme_of(config: Mapping[str, Any], parts: Mapping[str, _Shaped]) -> Scheme:
    """The scheme of one linear, by its config and what is stored of it.

    Raises:
        InputError: blocks that do not fit the scales.
    """
    blocks = config.get("weight_block_size")
    if "weight_scale_inv" not in parts or blocks is None:
        return Scheme(8, PER_CHANNEL, True, codebook="e4m3")
    rows, columns = blocks
    shape, scales = parts["weight"].shape, parts["weight_scale_inv"].shape
    expected = (-(-shape[0] // rows), -(-shape[1] // columns))
    if tuple(scales) != expected:
        raise InputError(f"weight_scale_inv has shape {list(scales)}, expected {list(expected)}")
    return Scheme(8, int(columns), True, codebook="e4m3", block_rows=int(rows))


def activations_of(config: Mapping[str, Any]) -> ActivationScheme:
    """How activations are rounded."""
    if config.get("activation_scheme", "dynamic") == "static":
        return ActivationScheme("e4m3", 8, None, dynamic=False)
    return ActivationScheme("e4m3", 8, _GROUP if config.get("weight_block_size") else PER_CHANNEL)


def as_scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that compressed-tensors has for them."""
    names = {"weight_scale_inv": "weight_scale", "activation_scale": "input_scale"}
    return {names.get(part, part): tensor for part, tensor in tensors.items()}
