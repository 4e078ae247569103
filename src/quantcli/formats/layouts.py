"""Layouts of compressed-tensors that fix a grid, and round activations too; how they describe grids in words.

`int-quantized` is W8A8 with integers, `float-quantized` the same with FP8 (one scale per row, or per block of 128 x
128), `nvfp4-pack-quantized` and `mxfp4-pack-quantized` are FP4 with a scale for 16 or 32 columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantcli.errors import InputError
from quantcli.scheme import PER_CHANNEL, ActivationScheme, Scheme

__all__ = ["LAYOUTS", "METHOD", "Layout", "activation_args", "activations_of", "weight_args", "weights_of"]

METHOD = "compressed-tensors"
"""Its `quant_method`."""
_BLOCK = 128
_SCALE_TYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}


@dataclass(frozen=True)
class Layout:
    """What a layout fixes."""

    name: str
    """As in `--format`."""
    bits: int
    group_sizes: tuple[int, ...]
    """Columns that share a scale, the default first."""
    activations: tuple[str, ...]
    """Ways to round them, the default first; float: not at all."""
    codebook: str | None = None
    scale: Literal["float", "e8m0", "e4m3"] = "float"

    def weights(self, group_size: int) -> Scheme:
        """The grid of weights."""
        rows = _BLOCK if group_size == _BLOCK else 1
        return Scheme(self.bits, group_size, True, codebook=self.codebook, scale=self.scale, block_rows=rows)

    def inputs(self, how: str, group_size: int) -> ActivationScheme | None:
        """How what a linear reads is rounded: dynamic, static or float."""
        if how == "float":
            return None
        element: Any = self.codebook or "int"
        if self.codebook == "e2m1":
            return ActivationScheme(element, self.bits, group_size, scale=self.scale)
        if how == "static":
            return ActivationScheme(element, self.bits, None, dynamic=False)
        return ActivationScheme(element, self.bits, group_size)


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("int-quantized", 8, (PER_CHANNEL,), ("dynamic", "static")),
        Layout("float-quantized", 8, (PER_CHANNEL, _BLOCK), ("dynamic", "static"), "e4m3"),
        Layout("nvfp4-pack-quantized", 4, (16,), ("dynamic", "float"), "e2m1", "e4m3"),
        Layout("mxfp4-pack-quantized", 4, (32,), ("dynamic", "float"), "e2m1", "e8m0"),
    )
}
"""By name."""


def weight_args(scheme: Scheme) -> dict[str, Any]:
    """How `config_groups` describes the weights of a scheme."""
    args: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.codebook is None else "float",
        "symmetric": scheme.symmetric,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    if scheme.block_rows > 1:
        args |= {"strategy": "block", "group_size": None, "block_structure": [scheme.block_rows, scheme.group_size]}
    elif scheme.group_size == PER_CHANNEL:
        args |= {"strategy": "channel", "group_size": None}
    return args | _scale_args(scheme.scale)


def activation_args(scheme: ActivationScheme) -> dict[str, Any]:
    """How `config_groups` describes activations."""
    per_tensor = scheme.group_size is None
    args: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.element == "int" else "float",
        "symmetric": scheme.symmetric,
        "strategy": "tensor" if per_tensor else "token" if scheme.group_size == PER_CHANNEL else "group",
        "group_size": None if scheme.group_size == PER_CHANNEL else scheme.group_size,
        "dynamic": scheme.dynamic,
    }
    if scheme.stored:  # what calibration looked at
        args["observer"] = "static_minmax"
    return args | _scale_args(scheme.scale) | ({"dynamic": "local"} if scheme.scale == "e4m3" else {})


def _scale_args(scale: str) -> dict[str, Any]:
    kinds = {"scale_dtype": _SCALE_TYPES[scale]} if scale != "float" else {}
    return kinds | ({"strategy": "tensor_group"} if scale == "e4m3" else {})


def weights_of(args: Mapping[str, Any]) -> Scheme:
    """The scheme of weights that are described so.

    Raises:
        InputError: it is none that we read.
    """
    bits, strategy, size = int(args.get("num_bits", 8)), args.get("strategy"), args.get("group_size")
    codebook = _element(args)
    if strategy not in (None, "group", "channel", "tensor", "tensor_group", "block"):
        raise InputError(f"strategy {strategy!r}: group, channel, tensor, tensor_group and block are read")
    rows = 1
    if strategy == "block":
        rows, size = _block_structure(args)
    elif strategy in ("channel", "tensor") or size is None:
        size = PER_CHANNEL
    if codebook is not None and not args.get("symmetric", True):
        raise InputError("floats with zero points are not read")
    return Scheme(
        bits,
        int(size),
        bool(args.get("symmetric", True)),
        codebook=codebook,
        scale=_scale_of(args, codebook),
        block_rows=rows,
    )


def activations_of(args: Mapping[str, Any] | None) -> ActivationScheme | None:
    """How activations that are described so are rounded.

    Raises:
        InputError: in a way that we do not simulate.
    """
    if not args:
        return None
    strategy, dynamic, bits = args.get("strategy"), args.get("dynamic", False), int(args.get("num_bits", 8))
    sizes: dict[Any, int | None] = {None: None, "tensor": None, "token": PER_CHANNEL}
    if strategy in ("group", "tensor_group"):
        sizes[strategy] = int(args["group_size"])
    known = strategy in sizes and not (strategy in ("token", "group") and not dynamic)
    if not known or (strategy == "tensor_group" and dynamic != "local"):
        raise InputError(f"activations of strategy {strategy!r}, dynamic {dynamic!r} are not read")
    codebook: Any = _element(args)
    return ActivationScheme(
        codebook or "int",
        bits,
        sizes[strategy],
        dynamic=bool(dynamic),
        scale=_scale_of(args, codebook),
        symmetric=bool(args.get("symmetric", True)),
    )


def _element(args: Mapping[str, Any]) -> str | None:
    """The small float; None of integers."""
    bits, kind = int(args.get("num_bits", 8)), args.get("type", "int")
    if kind == "int":
        return None
    found = {4: "e2m1", 8: "e4m3"}.get(bits)
    if found is None:
        raise InputError(f"floats of {bits} bits: those of 4 and 8 are read")
    return found


def _scale_of(args: Mapping[str, Any], codebook: str | None) -> Literal["float", "e8m0", "e4m3"]:
    """Older files do not say what their scales are; the groups do."""
    if codebook is None:
        return "float"
    if args.get("strategy") == "tensor_group":
        return "e4m3"
    said = str(args.get("scale_dtype") or "")
    older = codebook == "e2m1" and args.get("group_size") == 32 and not said
    return "e8m0" if said.endswith("uint8") or older else "float"


def _block_structure(args: Mapping[str, Any]) -> tuple[int, int]:
    found = args.get("block_structure")
    try:
        rows, columns = (int(n) for n in (found.split("x") if isinstance(found, str) else found or ()))
    except (TypeError, ValueError) as error:
        raise InputError(f"block_structure {found!r}: two numbers are expected") from error
    return rows, columns
