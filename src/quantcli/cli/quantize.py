"""`quantcli quantize`: a smaller checkpoint, and what it cost."""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle
from quantcli.cli.evaluate import SIMULATION_STYLES
from quantcli.cli.flags import parse_duration, parse_settings, parse_size
from quantcli.errors import UsageError
from quantcli.options import (
    ACTIVATIONS,
    DTYPES,
    FORMATS,
    GGUF_TYPES,
    GRAPH_ENCODINGS,
    KV_CACHES,
    MOE_CALIBRATIONS,
    PRESETS,
    READER_NAMES,
    ConfigurationFile,
    Override,
    QuantizeOptions,
)

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "run", "show"]

_NAMED_CHANNELS = 6


def run(options: QuantizeOptions, console: "Console") -> Any:
    """Quantizes a checkpoint or a graph; its plan with --dry-run."""
    from quantcli.pipelines import quantize

    return quantize.run(options, console)


def show(result: Any, console: "Console") -> None:
    """A table per layer kind and one summary line, or the plan of a dry run."""
    from quantcli.cli.console import human_duration, human_size

    if hasattr(result, "rows"):
        console.pairs("Plan (nothing was done)", result.rows())
        return
    kinds: dict[tuple[str, int, int], list[Any]] = defaultdict(list)
    for layer in result.layers:
        kinds[layer.kind, layer.bits, layer.group_size].append(layer)
    rows = []
    for (kind, bits, group_size), layers in kinds.items():
        errors = [layer.relative_error for layer in layers]
        worst = max(layers, key=lambda layer: layer.relative_error)
        against = [layer.rtn_relative_error for layer in layers if layer.rtn_relative_error]
        gain = f"{sum(errors) / sum(against):.2f}x" if len(against) == len(errors) and sum(against) > 0 else "-"
        rows.append(
            (
                kind,
                worst.name,
                str(bits),
                "row" if group_size == -1 else str(group_size),
                str(len(layers)),
                human_size(sum(layer.size_bytes for layer in layers)),
                f"{sum(errors) / len(errors):.2%}",
                f"{worst.relative_error:.2%}",
                gain,
            )
        )
    heads = ("layers", "worst", "bits", "group", "count", "size", "mean error", "worst error", "vs rtn")
    if rows:
        console.table(heads, rows, left=2)
    if getattr(result, "comparison", None) is not None:
        _show_comparison(result.comparison, console)
    if getattr(result, "outputs", None) is not None:
        console.text(str(result.outputs))
    if getattr(result, "scales", None):
        _show_scales(result.scales, console)
    if getattr(result, "outliers", None):
        _show_outliers(result.outliers, console)
    if result.evaluation is not None:
        from quantcli.cli.evaluate import show as show_evaluation

        show_evaluation(result.evaluation, console)
    share = result.size_bytes / result.parent_size_bytes if result.parent_size_bytes else 1
    stored = "" if result.bits_per_weight is None else f"{result.bits_per_weight:.2f} bits per weight, "
    content = getattr(result, "information_bits_per_weight", None)
    if content is not None and content < result.bits_per_weight:
        stored = f"{result.bits_per_weight:.2f} bits per weight that hold {content:.2f}, "
    if getattr(result, "share", None) is not None:
        for one in result.share.left:
            console.text(f"left float: {one.kind} ({one.count}, {one.parameters:,} parameters): {one.reason}")
        stored = f"{result.share.words}, {stored}"
    console.text(
        f"{result.output}: {human_size(result.size_bytes)}, {share:.0%} of {human_size(result.parent_size_bytes)}, "
        f"{stored}in {human_duration(result.seconds)}, peak memory {human_size(result.peak_bytes)}"
    )


def _show_comparison(comparison: dict[str, Any], console: "Console") -> None:
    """Which nodes lose most, and what comes out in the end."""
    rows = [
        (node["name"], node["op_type"], f"{node['own_db']:.1f}", _decibels(node["model_db"]))
        for node in comparison["nodes"]
    ]
    console.table(("node", "operator", "own dB", "in the model dB"), rows, left=2)
    ratios = ", ".join(f"{name} {ratio:.1f} dB" for name, ratio in comparison["outputs"].items())
    console.text(f"signal to quantization noise of the outputs on {comparison['samples']} samples: {ratios}")


def _show_scales(scales: list[Any], console: "Console") -> None:
    """How much of the difficulty of how many inputs went into weights."""
    alphas = sorted(scale.alpha for scale in scales if scale.alpha is not None)
    text = f"{len(alphas)} of {len(scales)} inputs smoothed"
    if alphas:
        middle = alphas[len(alphas) // 2]
        text += f", alpha {alphas[0]:g} to {alphas[-1]:g}, {middle:g} in the middle"
    errors = [scale.relative_error for scale in scales if scale.relative_error is not None]
    if errors:
        text += f"; error of rounded products {sum(errors) / len(errors):.2f}x on average"
    console.text(text)


def _show_outliers(outliers: list[Any], console: "Console") -> None:
    """Which channels hold outliers, input by input."""
    rows = []
    for found in outliers:
        named = ", ".join(map(str, found.channels[:_NAMED_CHANNELS]))
        rows.append(
            (
                found.linears[0] + (f" and {len(found.linears) - 1} more" if len(found.linears) > 1 else ""),
                named + (", ..." if found.outlier_columns > _NAMED_CHANNELS else ""),
                f"{found.outlier_columns} of {found.columns}",
                f"{found.touched:.1%}",
                f"{found.largest:.3g}",
            )
        )
    console.table(("input of", "outlier channels", "count", "tokens", "largest"), rows, left=2)
    apart = sum(found.outlier_columns for found in outliers) / sum(found.columns for found in outliers)
    text = (
        f"outlier features (magnitude {outliers[0].threshold:g} or more): {apart:.2%} of all channels, in "
        f"{sum(found.outlier_columns > 0 for found in outliers)} of {len(outliers)} inputs"
    )
    scaled = sum(found.scaled for found in outliers)
    console.text(text + (f"; counted before {scaled} inputs were scaled" if scaled else ""))


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _overrides(words: list[str]) -> tuple[Override, ...]:
    return tuple(Override.parse(word) for word in words)


def _config(word: str) -> ConfigurationFile:
    """What a file says stands in its place before flags are parsed; what gets here was not seen as a flag."""
    raise UsageError(
        f"the configuration {word} was not read: its flag stands in one word with others", hint=f"write --config {word}"
    )


def _widths(words: list[str]) -> tuple[int, ...]:
    found = [word.strip() for text in words for word in text.split(",")]
    if not all(word.isdecimal() for word in found):
        raise UsageError(f"--mixed-bits {','.join(words)!r} are not whole numbers", hint="write --mixed-bits 3,4,8")
    return tuple(int(word) for word in found)


def _operators(words: list[str]) -> tuple[str, ...]:
    return tuple(word.strip() for text in words for word in text.split(",") if word.strip())


COMMAND = Command(
    name="quantize",
    summary="Quantize a Hugging Face checkpoint or an ONNX graph and report what it cost.",
    options=QuantizeOptions,
    run=run,
    show=show,
    styles={
        "model": FlagStyle(("-m", "--model")),
        "output": FlagStyle(("-o", "--output")),
        "algorithm": FlagStyle(("-a", "--algorithm")),
        "config": FlagStyle(("-c", "--config"), metavar="FILE", read=_config),
        "preset": FlagStyle(choices=PRESETS, metavar="|".join(PRESETS)),
        "backend": FlagStyle(metavar="NAME"),
        "timeout": FlagStyle(metavar="TIME", read=parse_duration),
        "settings": FlagStyle(("--set",), metavar="KEY=VALUE", read=parse_settings),
        "symmetric": FlagStyle(("--sym/--asym",)),
        "target_size": FlagStyle(metavar="SIZE", read=parse_size),
        "mixed_bits": FlagStyle(metavar="N,N,...", read=_widths),
        "exclude": FlagStyle(metavar="REGEX"),
        "moe_calibration": FlagStyle(choices=MOE_CALIBRATIONS, metavar="|".join(MOE_CALIBRATIONS)),
        "overrides": FlagStyle(("--override",), metavar="REGEX=KEY=VALUE,...", read=_overrides),
        "format": FlagStyle(choices=FORMATS, metavar="|".join(FORMATS)),
        "activations": FlagStyle(choices=ACTIVATIONS, metavar="|".join(ACTIVATIONS)),
        "kv_cache": FlagStyle(choices=KV_CACHES, metavar="|".join(KV_CACHES)),
        "gguf_type": FlagStyle(choices=GGUF_TYPES, metavar="Q4_K_M|...", read=str.lower),
        "readers": FlagStyle(("--for",), choices=READER_NAMES, metavar="NAME"),
        "dtype": FlagStyle(choices=DTYPES, metavar="|".join(DTYPES)),
        "max_memory": FlagStyle(metavar="SIZE", read=parse_size),
        "data": FlagStyle(metavar="FILE|self|builtin", choices=("self", "builtin")),
        "encoding": FlagStyle(choices=GRAPH_ENCODINGS, metavar="|".join(GRAPH_ENCODINGS)),
        "op_types": FlagStyle(metavar="NAME,...", read=_operators),
        "nodes_include": FlagStyle(metavar="REGEX"),
        "nodes_exclude": FlagStyle(metavar="REGEX"),
        "min_sqnr": FlagStyle(metavar="DB"),
        "calibration_inputs": FlagStyle(metavar="FILE|FOLDER"),
        "image_spec": FlagStyle(metavar="KEY=VALUE,..."),
        "user_script": FlagStyle(metavar="FILE"),
        "data_function": FlagStyle(metavar="NAME"),
        "calibration_cache": FlagStyle(metavar="FILE"),
        "preprocess": FlagStyle(choices=("none", "qnn"), metavar="none|qnn"),
        "inputs_to_make_channel_last": FlagStyle(metavar="NAME,..."),
        "outputs_to_make_channel_last": FlagStyle(metavar="NAME,..."),
        **SIMULATION_STYLES,
    },
    settings={
        "damp_percent": ("damp_percent", None),
        "desc_act": ("order", "desc_act"),
        "weight_type": ("weight_type", None),
        "activation_type": ("activation_type", None),
        "calibrate_method": ("calibrate_method", None),
        "per_channel": ("per_channel", "true"),
        "reduce_range": ("reduce_range", "true"),
        "equalize": ("equalize", "true"),
        "bias_correction": ("bias_correction", "true"),
        "preprocess": ("preprocess", None),
        "fuse_layernorm": ("fuse_layernorm", "true"),
        "inputs_to_make_channel_last": ("inputs_to_make_channel_last", None),
        "outputs_to_make_channel_last": ("outputs_to_make_channel_last", None),
    },
    panels={
        "Calibration": ("calibration", "correct_earlier"),
        "Simulation": ("simulation",),
        "ONNX graphs": (
            "graph",
            "weight_type",
            "activation_type",
            "calibrate_method",
            "per_channel",
            "reduce_range",
            "equalize",
            "bias_correction",
            "preprocess",
            "fuse_layernorm",
            "inputs_to_make_channel_last",
            "outputs_to_make_channel_last",
        ),
        "Run": ("device", "max_memory", "trust_remote_code", "evaluate", "force", "dry_run"),
    },
    examples=(
        "quantcli quantize -m SmolLM2-135M -o Q",
        "quantcli quantize -m SmolLM2-135M -o Q3 --preset best --bits 3 --data notes.txt --evaluate",
        "quantcli quantize -m SmolLM2-135M -o Q --target-bits 3.5 --evaluate",
        "quantcli quantize -m SmolLM2-135M -o Q --config gptq_pass.json --data notes.txt",
        "quantcli quantize -m SmolLM2-135M -o Q --override 'down_proj=bits=8' --dry-run",
        "quantcli quantize -m model.onnx -o Q -a gptq --group-size 32 --calibration-inputs samples",
        "quantcli quantize -m cnn.onnx -o Q -a static --per-channel --calibration-inputs photos --image-spec size=224",
        "quantcli quantize -m SmolLM2-135M -o Q --backend gptqmodel -a gptq --data notes.txt",
    ),
)
