"""Which algorithms run, with which settings and into which format; flags that none of them reads are refused."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace

from quantcli import algorithms
from quantcli.algorithms import KEEP_FLOAT, Algorithm, Step
from quantcli.errors import UsageError
from quantcli.formats.layouts import LAYOUTS
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines.planning.layout import activations

__all__ = ["allowed_formats", "check_ranges", "resolve_bits", "resolve_group_size", "resolve_steps"]

_BEST = {"refit": "true", "sweeps": "2"}
_PRESETS: Mapping[str, tuple[str, dict[str, str]]] = {
    "fast": ("kquant", {}),
    "balanced": ("gptq", {}),
    "best": ("awq,gptq", _BEST),
    "max": ("awq,gptq,distill", _BEST),
}


def resolve_steps(options: QuantizeOptions, model: str = "checkpoint") -> list[Step]:
    """Transforms, the rounder, and a trainer where one follows, each with its settings.

    Args:
        options: What was asked for.
        model: What is to be quantized: checkpoint or onnx.

    Raises:
        UsageError: algorithms, bits or flags that do not go together.
    """
    preset = options.preset
    if preset is None and options.algorithm is None:
        preset = "balanced"
    name, preset_settings = _PRESETS[preset] if preset else ("", {})
    chain = algorithms.find_chain(options.algorithm or name, model)
    _refuse_model(chain, model, options.model)
    rounding = [a for a in chain if a.kind != "trainer"]
    rounder = rounding[-1]
    meant = [n for n in name.split(",") if n and algorithms.find(n).kind != "trainer"][-1:]
    if preset and meant != [rounder.name]:  # with -a, a preset is only its settings of the rounder
        (meant_name,) = meant
        named = options.algorithm or ""
        transforms = ",".join(a.name for a in rounding[:-1])
        raise UsageError(
            f"preset {preset} is a setting of {meant_name}, not of {rounder.name}",
            hint=f"leave out --preset, or use -a {transforms + ',' if transforms else ''}{meant_name}"
            + (f" instead of {named}" if named else ""),
        )
    for algorithm in chain:
        given = options.bits if rounder.kind == "graph" else resolve_bits(options, rounder)
        if given is not None and given not in algorithm.bits:
            allowed = ", ".join(map(str, algorithm.bits))
            raise UsageError(f"{algorithm.name} makes {allowed} bits, not {given}", hint="see `quantcli algorithms`")
    if rounder is KEEP_FLOAT:
        _refuse_idle_rounding(options, rounding[-2].name)
    grids = [options.symmetric, *(override.symmetric for override in options.overrides)]
    if rounder.codebook and any(given is not None for given in grids):
        raise UsageError(f"{rounder.name} has no zero points, sym or asym would have no effect", hint="leave it out")
    steps = algorithms.make_steps(chain, {**preset_settings, **options.settings})
    check_ranges(options, steps[len(rounding) - 1])
    if model == "checkpoint":
        _refuse_idle_calibration(options, preset, chain)
    if options.correct_earlier and rounder.calibration != "required":
        raise UsageError(f"--correct-earlier is a step of gptq, {rounder.name} has none", hint="use -a gptq")
    return steps


def check_ranges(options: QuantizeOptions, step: Step) -> None:
    """Refuses a clip_ratio of overrides that the rounder does not know or take.

    Raises:
        UsageError: naming it.
    """
    for override in options.overrides:
        if override.clip_ratio is None:
            continue
        if not hasattr(step.settings, "clip_ratio"):
            raise UsageError(f"{step.algorithm.name} has no clip_ratio, rtn has", hint="use -a rtn")
        replace(step.settings, clip_ratio=override.clip_ratio)


def allowed_formats(asked: str | None, algorithm: Algorithm) -> tuple[str, ...]:
    """The format that was asked for, or those that are smaller than floats and may hold what the algorithm makes.

    Raises:
        UsageError: it cannot hold what the algorithm makes.
    """
    if asked is None:
        return tuple(n for n in algorithm.formats if n not in ("float", "gguf", *LAYOUTS)) or algorithm.formats
    if asked not in algorithm.formats:
        able = [a.name for a in algorithms.ALGORITHMS.values() if a.kind == "rounder" and asked in a.formats]
        raise UsageError(
            f"format {asked} cannot hold what {algorithm.name} makes: {', '.join(algorithm.formats)} can",
            hint=f"use --format {algorithm.formats[0]}, or -a {' or '.join(able)}",
        )
    return (asked,)


def resolve_bits(options: QuantizeOptions, rounder: Algorithm) -> int:
    """Bits per weight: as asked, or as usual, or all that the rounder makes."""
    usual = options.weight_bits
    return rounder.bits[0] if options.bits is None and usual not in rounder.bits else usual


def resolve_group_size(options: QuantizeOptions, steps: Sequence[Step], columns: Iterable[int]) -> int:
    """Columns that share a scale: as asked, or the wish of a transform that was named, if it divides all `columns`.

    Raises:
        UsageError: others were asked for than the rounder makes.
    """
    for algorithm in (step.algorithm for step in steps if step.algorithm.kind == "rounder"):
        if algorithm.group_size is not None:
            if options.group_size not in (None, algorithm.group_size):
                raise UsageError(
                    f"{algorithm.name} makes groups of {algorithm.group_size} alone, not {options.group_size}",
                    hint="leave --group-size out",
                )
            return algorithm.group_size
    wishes = [step.algorithm.group_size for step in steps if step.algorithm.group_size]
    heard = options.group_size is None and options.preset is None and options.algorithm is not None
    if wishes and heard and all(count % wishes[0] == 0 for count in columns):
        return wishes[0]
    return options.weight_group_size


def _refuse_model(chain: Sequence[Algorithm], model: str, folder: str) -> None:
    """Each algorithm says what it takes."""
    for algorithm in chain:
        if model in algorithm.inputs:
            continue
        if algorithm.kind == "trainer":
            raise UsageError(
                f"{algorithm.name} trains checkpoints, {folder} is an ONNX graph",
                hint="leave it out (--preset max is best and distill), or train the checkpoint and capture that",
            )
        if model == "checkpoint":
            first = ",".join(a.name for a in chain[:-1])
            hint = f"quantcli quantize -m {folder} -a {first} -o S, then " if first else ""
            raise UsageError(
                f"{algorithm.name} quantizes ONNX graphs, not checkpoints",
                hint=f"{hint}quantcli capture-onnx-graph -m {'S' if first else folder} -o GRAPH, "
                f"then quantcli quantize -m GRAPH -a {algorithm.name}",
            )
        able = [a.name for a in algorithms.ALGORITHMS.values() if model in a.inputs]
        raise UsageError(f"{algorithm.name} does not apply to ONNX graphs", hint=f"use one of {', '.join(able)}")


def _refuse_idle_rounding(options: QuantizeOptions, name: str) -> None:
    """No flag without effect: how to round where nothing is rounded."""
    fields_of_rounding = (
        "bits", "group_size", "symmetric", "target_bits", "target_size", "quantize_lm_head", "quantize_embeddings",
        "exclude", "overrides",
    )  # fmt: skip
    for field in fields_of_rounding:
        if getattr(options, field) != getattr(QuantizeOptions, field):
            raise UsageError(
                f"{name} alone writes a float model, {field} would have no effect",
                hint=f"name a rounder, as in -a {name},gptq",
            )
    if options.format not in (None, "float"):
        raise UsageError(f"{name} alone writes a float model", hint=f"use --format float, or -a {name},kquant")


def _refuse_idle_calibration(options: QuantizeOptions, preset: str | None, chain: Sequence[Algorithm]) -> None:
    """No flag without effect: text options where no text is read."""
    calibration = options.calibration
    if calibration.data_split != CalibrationOptions.data_split and calibration.data_name is None:
        raise UsageError("--data-split is for --data-name", hint="leave it out")
    inputs = activations(options)
    measures = options.kv_cache is not None or (inputs is not None and inputs.stored)
    algorithm = next(a for a in reversed(chain) if a.kind != "trainer")
    needs = measures or any(a.calibration == "required" for a in chain)
    if needs or (algorithm.calibration == "optional" and preset != "fast"):
        if needs or calibration.data or calibration.data_name:
            return
        who = f"{algorithm.name} without --data"
    else:
        who = "preset fast" if preset == "fast" else algorithm.name
    changed = [f.name for f in fields(calibration) if getattr(calibration, f.name) != f.default]
    if options.mixes:  # a few rows are read all the same
        changed = [name for name in changed if name in ("num_samples", "batch_size")]
    if changed:
        raise UsageError(
            f"{who} uses no calibration text, --{changed[0].replace('_', '-')} would have no effect",
            hint="leave it out, or use --preset balanced",
        )
