"""What a workflow of Olive says of a search, in words of `tune`: model and output, metric and goals, how to search."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.cli.aliases import Rename
from quantcli.errors import UsageError, nearest

__all__ = ["search_words"]

_GOALS = {
    "threshold": "{}",
    "max-degradation": "reference{worse}{}",
    "min-improvement": "reference{better}{}",
    "percent-max-degradation": "reference*{less}",
    "percent-min-improvement": "reference*{more}",
}
_SAMPLERS = {"tpe": "tpe", "random": "auto", "sequential": "grid"}
_QUALITY = ("accuracy", "custom")
_SIZES = ("size_on_disk",)
_TIMES = ("latency", "throughput")
_OBJECTIVES = {"performance": "latency", "modelsize": "size", "footprint": "size"}


def search_words(values: Mapping[str, Any], path: Path, notes: list[str]) -> list[str]:
    """Flags of `tune` for what a workflow says of the search; what was typed stands behind them and wins.

    Args:
        values: The workflow, or a pass.
        path: Its file: scripts that it names lie beside it, or where the command is run.
        notes: Gets what there is to tell.

    Raises:
        UsageError: evaluators that cannot be served.
    """
    around = {**values, **_object(values.get("engine"))}
    words: list[str] = []
    model = values.get("input_model")
    if isinstance(model, dict):
        known = {**_object(model.get("config")), **model}
        if isinstance(known.get("model_path"), str):
            file = known.get("onnx_file_name")
            words += ["--model", str(Path(known["model_path"]) / file) if file else known["model_path"]]
    if isinstance(around.get("output_dir"), str):
        words += ["--output", around["output_dir"]]
    metrics = _metrics(around, path)
    for one in _all_passes(values):
        inner = one["config"] if isinstance(one.get("config"), dict) else one
        if isinstance(inner.get("metric"), dict):
            metrics.append(inner["metric"])
        if isinstance(inner.get("tuning_criterion"), dict):
            words += _criterion(inner["tuning_criterion"], path)
    words += _measures(metrics, path, notes)
    strategy = around.get("search_strategy")
    return words + (_strategy(strategy, path) if isinstance(strategy, dict) else [])


def _object(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _all_passes(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if "type" in values:
        return [values]
    held = values.get("passes", values)
    return [one for one in held.values() if isinstance(one, dict)] if isinstance(held, dict) else []


def _metrics(around: Mapping[str, Any], path: Path) -> list[Mapping[str, Any]]:
    """The metrics of the evaluator that is named, or of the only one."""
    evaluators, named = around.get("evaluators"), around.get("evaluator")
    if isinstance(named, dict):
        return list(named.get("metrics", []))
    if evaluators is None and named is None:
        return []
    if isinstance(evaluators, list):
        evaluators = {str(e.get("name")): e for e in evaluators if isinstance(e, dict)}
    if not isinstance(evaluators, dict) or not all(isinstance(e, dict) for e in evaluators.values()):
        raise UsageError(f'{path}: "evaluators" is an object of objects by name')
    if named is None:
        return []
    if named not in evaluators:
        raise UsageError(f'{path}: "evaluator" {named!r} is not defined, {nearest(str(named), evaluators)}')
    return list(evaluators[named].get("metrics", []))


def _measures(metrics: list[Mapping[str, Any]], path: Path, notes: list[str]) -> list[str]:
    """--metric, --goal and --minimize; the first of each kind by its priority."""
    words: list[str] = []
    quality: str | None = None
    cost: str | None = None
    for metric in metrics:
        kind, subs = str(metric.get("type", "")).lower(), _subs(metric)
        if kind in _QUALITY and quality is None:
            sub = subs[0] if subs else {}
            quality, lower = _quality(metric, kind, sub, path, notes)
            words += ["--metric", quality] + ["--lower-is-better"] * (lower and ":" in quality)
            words += _goal(quality.rpartition(":")[2], sub, lower, path)
        elif kind in _SIZES or kind in _TIMES:
            name = "size" if kind in _SIZES else "latency"
            cost = cost or name
            bound = [s for s in subs if s.get("goal")]
            if bound and kind != "throughput":
                words += _goal(name, bound[0], True, path)
            others = [str(s.get("name")) for s in subs if s.get("name") not in ("avg", "bytes", None)]
            if others or kind == "throughput":
                what = ", ".join(others) or "throughput"
                notes.append(f'metric "{metric.get("name", kind)}": the median latency is measured, not {what}')
        elif kind in _QUALITY:
            notes.append(f'metric "{metric.get("name", kind)}" is left out: {quality} is the metric')
        else:
            known = (*_QUALITY, *_SIZES, *_TIMES)
            raise UsageError(f"{path}: unknown metric type {kind!r}, {nearest(kind, known)}")
    return words + (["--minimize", cost] if cost is not None else [])


def _subs(metric: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a metric, by priority."""
    found = metric.get("sub_types") or []
    listed = [{"name": s} if isinstance(s, str) else s for s in found if isinstance(s, str | dict)]
    return sorted(listed, key=lambda s: s.get("priority") if isinstance(s.get("priority"), int) else 99)  # type: ignore[arg-type,return-value]


def _quality(
    metric: Mapping[str, Any], kind: str, sub: Mapping[str, Any], path: Path, notes: list[str]
) -> tuple[str, bool]:
    """The metric in our words, and whether lower is better."""
    called = f'metric "{metric.get("name", kind)}"'
    if kind == "accuracy":
        if sub.get("name") == "perplexity":
            return "perplexity", True
        notes.append(
            f"{called}: accuracy is the share of first choices that are the float model's, labels are not read"
        )
        return "accuracy", False
    config = metric.get("user_config")
    if not isinstance(config, dict) or not isinstance(config.get("evaluate_func"), str):
        raise UsageError(
            f'{path}: {called} names no "evaluate_func"',
            hint='as in "user_config": {"user_script": …, "evaluate_func": …}',
        )
    arguments = config.get("evaluate_func_kwargs") or {}
    odd = [name for name in arguments if name not in ("batch_size", "data_dir")]
    if odd:
        raise UsageError(f"{path}: {called}: {odd[0]} cannot be handed to a function", hint="give it a default there")
    script = _beside(path, str(config.get("user_script", "")))
    lower = sub.get("higher_is_better") is False or metric.get("higher_is_better") is False
    return f"{script}:{config['evaluate_func']}", lower


def _beside(path: Path, script: str) -> str:
    near = path.parent / script
    return str(near) if not Path(script).is_absolute() and near.is_file() else script


def _goal(name: str, sub: Mapping[str, Any], lower: bool, path: Path) -> list[str]:
    goal = sub.get("goal")
    if not isinstance(goal, dict):
        return []
    kind, value = goal.get("type"), goal.get("value")
    if kind not in _GOALS or not isinstance(value, int | float):
        raise UsageError(f"{path}: goal {dict(goal)} of {name} is none", hint=f"types are {', '.join(_GOALS)}")
    worse, better = ("+", "-") if lower else ("-", "+")
    share = value / 100 if lower else -value / 100
    bound = _GOALS[kind].format(f"{value:g}", worse=worse, better=better, less=f"{1 + share:g}", more=f"{1 - share:g}")
    return ["--goal", f"{name}{'<=' if lower else '>='}{bound}"]


def _criterion(found: Mapping[str, Any], path: Path) -> list[str]:
    """Intel's: trials, time, and what is to become small."""
    words: list[str] = []
    for key, value in found.items():
        if key == "max_trials" and isinstance(value, int):
            words += ["--trials", str(value)]
        elif key == "timeout" and isinstance(value, int):
            words += ["--timeout", f"{value}s"] if value else []
        elif key == "objective" and value in _OBJECTIVES:
            words += ["--minimize", _OBJECTIVES[value]]
        elif not (key in ("strategy", "strategy_kwargs") and value in ("basic", None)):
            raise UsageError(f'{path}: "tuning_criterion" has no {key!r} {value!r}', hint="leave it out")
    return words


_STRATEGY: Mapping[str, Rename] = {
    "max_samples": Rename("--trials"),
    "num_samples": Rename("--trials"),
    "max_iter": Rename("--trials"),
    "seed": Rename("--seed"),
    "max_time": Rename("--timeout"),
}


def _strategy(found: Mapping[str, Any], path: Path) -> list[str]:
    words: list[str] = []
    for key, value in found.items():
        if key == "sampler":
            name = str(value.get("name") if isinstance(value, dict) else value).lower()
            if name not in _SAMPLERS:
                raise UsageError(f"{path}: unknown sampler {name!r}, {nearest(name, _SAMPLERS)}")
            words += ["--sampler", _SAMPLERS[name]]
        elif key in _STRATEGY and value is not None:
            words += [_STRATEGY[key].to, str(value)]
        elif key == "stop_when_goals_met":
            words += ["--stop-at-first"] if value else []
        elif key not in ("execution_order", "output_model_num", "include_pass_params"):
            known = ["sampler", *_STRATEGY, "stop_when_goals_met", "execution_order"]
            raise UsageError(f'{path}: "search_strategy" has no key {key!r}, {nearest(key, known)}')
    return words
