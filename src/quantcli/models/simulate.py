"""Quantized activations and KV caches, simulated: a loaded model computes with the values that few bits could hold.

What is rounded, as in QuaRot (https://arxiv.org/abs/2404.00456): the input of every linear in the blocks, per token
(after R4 where the folder has it; routers and the output head read float); keys as they enter the cache, after their
position is in (and after R3 where the folder has online rotations), and values, per token and head. A cache that holds
float is read in full at every step and rounded again, token by token: the same values as if it held codes.
"""

from typing import Any

from torch import Tensor, nn

from quantcli.errors import UsageError
from quantcli.models.attention import intercept
from quantcli.models.layout import Layout
from quantcli.models.online import OnlineRotations, RunningRotation
from quantcli.options import SimulationOptions
from quantcli.tensors.activations import quantize_per_token

__all__ = ["rotate_and_round_cache", "round_inputs", "simulate"]


def simulate(model: Any, layout: Layout, options: SimulationOptions, online: OnlineRotations | None) -> None:
    """Makes a model compute as if its activations and cache were quantized.

    Args:
        model: A transformers model with its weights, R4 already in place where its folder needs it.
        layout: Its parts, as its skeleton had them.
        options: Bits and grids.
        online: The folder's rotations; R3 is put in front of rounded keys.

    Raises:
        InputError: keys or values are to be rounded in a model that computes attention in a way of its own.
        UsageError: groups wider than a head.
    """
    if options.a_bits < 16:
        round_inputs(model, layout.linears, options)
    if options.k_bits < 16 or options.v_bits < 16:
        rotate_and_round_cache(model, len(layout.blocks), options, online if options.k_bits < 16 else None)


def round_inputs(model: nn.Module, linears: tuple[str, ...], options: SimulationOptions) -> None:
    """Rounds what each of the linears is given, by hooks that come after those that are there."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = quantize_per_token(
            args[0], options.a_bits, symmetric=options.a_symmetric, clip_ratio=options.activation_clip
        )
        return (x, *args[1:])

    for name in linears:
        model.get_submodule(name).register_forward_pre_hook(hook)


def rotate_and_round_cache(model: Any, blocks: int, options: SimulationOptions, online: OnlineRotations | None) -> None:
    """Puts a function of ours where a model dispatches its attention, which hands on to the one that it had.

    Args:
        model: A transformers model.
        blocks: How many attentions must come through: one per block.
        options: Bits and grids of keys and values; 16 rounds nothing.
        online: Where R3 comes from; None leaves queries and keys as they are.

    Raises:
        InputError: not all of them do.
        UsageError: groups wider than a head.
    """
    intercept(model, blocks, _Rounding(options, online), "leave out --k-bits and --v-bits; --a-bits works")


class _Rounding:
    """R3, then rounded keys and values."""

    def __init__(self, options: SimulationOptions, online: OnlineRotations | None):
        self._options, self._online = options, online
        self._rotations: dict[int, RunningRotation] = {}

    def __call__(self, _module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of query [B, H, T, D], key and value [B, H', S, D]."""
        if self._online is not None:
            rotation = self._rotation(key.shape[-1])
            query, key = rotation(query), rotation(key)
        return query, self._rounded(key, self._options.k_bits), self._rounded(value, self._options.v_bits)

    def _rotation(self, size: int) -> RunningRotation:
        if size not in self._rotations:
            assert self._online is not None
            self._rotations[size] = RunningRotation(self._online.keys(size))
        return self._rotations[size]

    def _rounded(self, x: Tensor, bits: int) -> Tensor:
        options = self._options
        if bits == 16:
            return x
        if options.kv_group_size > x.shape[-1]:
            raise UsageError(
                f"--kv-group-size {options.kv_group_size} is more than the {x.shape[-1]} entries of a head",
                hint="leave it out: one grid per head",
            )
        return quantize_per_token(
            x,
            bits,
            symmetric=options.kv_symmetric,
            group_size=options.kv_group_size,
            clip_ratio=options.cache_clip(bits),
        )
