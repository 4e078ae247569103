"""Options that a format with a fixed grid decides, and those that it forbids."""

from dataclasses import replace

from quantcli.errors import UsageError
from quantcli.formats.layouts import LAYOUTS, METHOD, Layout
from quantcli.options import QuantizeOptions
from quantcli.scheme import PER_CHANNEL, ActivationScheme, Scheme

__all__ = ["activations", "resolve_layout", "weight_scheme"]

_CALIBRATED = {None: "smoothquant,gptq", "balanced": "smoothquant,gptq", "best": "smoothquant,gptq"}
"""What W8A8 of integers runs where no algorithm is named, by preset: it lives by even activations."""


def resolve_layout(options: QuantizeOptions) -> QuantizeOptions:
    """Bits, group size, grid, activations and, of W8A8, the algorithm, where the format says them.

    Raises:
        UsageError: something else was asked for.
    """
    layout = LAYOUTS.get(options.format or "")
    if options.kv_cache is not None and layout is None and options.format != METHOD:
        raise UsageError(
            "--kv-cache fp8 is stored by the layouts of compressed-tensors",
            hint=f"use --format {METHOD} or {' or '.join(LAYOUTS)}",
        )
    if layout is None:
        if options.activations is not None:
            raise UsageError(
                f"--activations is for layouts that round them: {', '.join(LAYOUTS)}", hint="add --format int-quantized"
            )
        return options
    _refuse_others(options, layout)
    size = layout.group_sizes[0] if options.group_size is None else options.group_size
    how = options.activations or layout.activations[0]
    if how == "static" and size != PER_CHANNEL:
        raise UsageError(f"blocks of {size} have dynamic activations", hint="leave --activations static out")
    algorithm = options.algorithm
    if layout.codebook is None and algorithm is None:
        algorithm = _CALIBRATED.get(options.preset)
    return replace(options, bits=layout.bits, group_size=size, activations=how, algorithm=algorithm)


def _refuse_others(options: QuantizeOptions, layout: Layout) -> None:
    """No flag without effect, none against the layout."""
    if options.mixes:
        raise UsageError(f"{layout.name} has {layout.bits} bits, there is nothing to mix", hint="use another --format")
    if options.bits not in (None, layout.bits):
        raise UsageError(f"{layout.name} has {layout.bits} bits, not {options.bits}", hint="leave --bits out")
    if options.symmetric is False:
        raise UsageError(f"{layout.name} has no zero points", hint="leave --asym out")
    if options.group_size is not None and options.group_size not in layout.group_sizes:
        known = " or ".join(map(str, layout.group_sizes))
        raise UsageError(f"{layout.name} has groups of {known}, not {options.group_size}", hint="leave it out")
    if options.activations is not None and options.activations not in layout.activations:
        known = " or ".join(layout.activations)
        hint = f"use --format {METHOD} --bits 8" if options.activations == "float" else f"use {known}"
        raise UsageError(f"{layout.name} has {known} activations, not {options.activations}", hint=hint)
    for override in options.overrides:
        if override.scheme:
            raise UsageError(
                f"{layout.name} has one grid, --override {override.pattern!r} would change it",
                hint="leave linears float with --exclude",
            )


def weight_scheme(options: QuantizeOptions) -> Scheme | None:
    """The grid of weights, where the format fixes it."""
    layout = LAYOUTS.get(options.format or "")
    return None if layout is None else layout.weights(options.weight_group_size)


def activations(options: QuantizeOptions) -> ActivationScheme | None:
    """How activations are rounded, once the layout is resolved."""
    layout = LAYOUTS.get(options.format or "")
    if layout is None:
        return None
    return layout.inputs(options.activations or layout.activations[0], options.weight_group_size)
