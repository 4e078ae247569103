"""`quantcli tune`: the best of what a space allows, and what it is weighed against."""

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle
from quantcli.cli.flags import parse_size
from quantcli.cli.quantize import COMMAND as QUANTIZE
from quantcli.errors import QualityError, UsageError
from quantcli.options import COSTS, METRICS, SAMPLERS, SETS, Goal, TuneOptions

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "check", "run", "shared_words", "show"]

_SECONDS = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def run(options: TuneOptions, console: "Console") -> Any:
    """Searches; its plan with --dry-run."""
    from quantcli.cli.app import search_space
    from quantcli.pipelines import tune

    return tune.run(options, console, search_space(options))


def shared_words(options: TuneOptions) -> list[str]:
    """What all trials share, as flags of `quantize`."""
    words = ["--model", options.model, "--output", str(options.output)]
    words += ["--algorithm", options.algorithm] if options.algorithm is not None else []
    words += ["--device", options.device] if options.device is not None else []
    words += ["--trust-remote-code"] if options.trust_remote_code else []
    for owner in (options.calibration, options.graph):
        for spec in fields(owner):
            value = getattr(owner, spec.name)
            if value == spec.default:
                continue
            flag = "--" + spec.name.replace("_", "-")
            if isinstance(value, bool):
                words += [flag if value else "--no-" + flag[2:]]
            else:
                for part in value if isinstance(value, tuple) else (value,):
                    words += [flag, str(part)]
    return words


def show(result: Any, console: "Console") -> None:
    """The front of both figures as a table, and what was kept; or the plan of a dry run."""
    from quantcli.cli.console import human_duration, human_size
    from quantcli.pipelines.tuning.loop import show_figure

    if hasattr(result, "rows"):
        console.pairs("Plan (nothing was done)", result.rows())
        return
    metric, minimize = result.metric.name, result.minimize
    rows = []
    for record in result.front:
        said = "kept" if record.number == result.best.number else "misses the goal" if record.missed else ""
        figures = [show_figure(name, record.figures[name]) for name in (metric, minimize)]
        others = [
            f"{name} {show_figure(name, value)}"
            for name, value in record.figures.items()
            if name not in (metric, minimize, "calibrated", "error")
        ]
        rows.append((str(record.number), record.label, *figures, ", ".join(others), said))
    console.table(
        ("trial", "what", metric, minimize, "", ""), rows, left=2, title="Nothing beats these in both figures"
    )
    best, states = result.best, [r.state for r in result.trials]
    counts = [f"{states.count('pruned')} given up early", f"{states.count('failed')} failed"]
    told = [text for text in counts if not text.startswith("0 ")]
    console.text(
        f"{result.output}: {best.label} (trial {best.number} of {len(states)}{''.join(f', {t}' for t in told)}), "
        f"{metric} {show_figure(metric, best.figures[metric])}, {human_size(best.figures['size'])} of "
        f"{human_size(result.parent_size_bytes)}, in {human_duration(result.seconds)}; ended: {result.ended}"
    )


def check(result: Any) -> None:
    """Exit code 5 where no trial meets the goals.

    Raises:
        QualityError: naming the closest, which is kept.
    """
    if getattr(result, "failures", None):
        raise QualityError("; ".join(result.failures), hint="loosen the goal, or widen the space")


def _goals(words: list[str]) -> tuple[Goal, ...]:
    return tuple(Goal.parse(word) for word in words)


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _SECONDS:
        raise UsageError(f"{text!r} is not a time", hint="write it as 90s, 30min or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def _graph_styles() -> dict[str, FlagStyle]:
    names = "encoding op_types nodes_include nodes_exclude min_sqnr calibration_inputs image_spec"
    names += " user_script data_function calibration_cache"
    return {name: QUANTIZE.styles[name] for name in names.split()}


COMMAND = Command(
    name="tune",
    summary="Search over algorithms and their options for the smallest or fastest model that is still good enough.",
    options=TuneOptions,
    run=run,
    show=show,
    check=check,
    styles={
        "model": FlagStyle(("-m", "--model")),
        "output": FlagStyle(("-o", "--output")),
        "space": FlagStyle(("-c", "--space", "--config"), metavar="FILE"),
        "predefined": FlagStyle(("--set",), choices=SETS, metavar="|".join(SETS)),
        "algorithm": FlagStyle(("-a", "--algorithm")),
        "metric": FlagStyle(choices=METRICS, metavar="NAME|FILE.py:FUNCTION"),
        "goals": FlagStyle(("--goal",), metavar="FIGURE<=X", read=_goals),
        "minimize": FlagStyle(choices=COSTS, metavar="|".join(COSTS)),
        "timeout": FlagStyle(metavar="TIME", read=_duration),
        "sampler": FlagStyle(choices=SAMPLERS, metavar="|".join(SAMPLERS)),
        "stop_at_first": FlagStyle(("--stop-at-first/--no-stop-at-first",)),
        "eval_data": FlagStyle(metavar="FILE"),
        "ray": FlagStyle(metavar="ADDRESS|local"),
        "ray_memory": FlagStyle(metavar="SIZE", read=parse_size),
        "data": QUANTIZE.styles["data"],
        **_graph_styles(),
    },
    panels={
        "Search": (
            "trials",
            "timeout",
            "sampler",
            "stop_at_first",
            "prune",
            "eval_data",
            "eval_samples",
            "eval_seq_len",
        ),
        "More than one machine": ("ray", "ray_cpus", "ray_gpus", "ray_memory"),
        "Calibration": ("calibration",),
        "ONNX graphs": ("graph",),
        "Run": ("device", "trust_remote_code", "force", "dry_run"),
    },
    examples=(
        "quantcli tune -m SmolLM2-135M -o T --goal 'kl<=0.05'",
        "quantcli tune -m SmolLM2-135M -o T --set woq --goal 'kl<=0.1' --data notes.txt",
        "quantcli tune -m SmolLM2-135M -o T --set mixed --goal 'perplexity<=16'",
        "quantcli tune -m cnn.onnx -o T --metric net.py:accuracy --goal 'accuracy>=reference-0.01' --minimize latency",
        "quantcli tune -m cnn.onnx -o T -a static --goal 'sqnr>=30' --calibration-inputs samples",
        "quantcli tune -m SmolLM2-135M -o T --trials 40 --timeout 1h --ray auto",
    ),
)
