"""`quantcli tune`: tries what a space allows, judges each trial, and keeps the best as `quantize` would write it.

The folder that is made keeps every trial (trials.jsonl) and Optuna's study, so that the same command goes on after a
kill. The model of the best trial so far lies in its state, the others' are removed.
"""

import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from quantcli.errors import InputError
from quantcli.folder import Manifest, PartialFolder, create_output, public_options, write_json
from quantcli.json_files import read_json
from quantcli.options import TuneOptions
from quantcli.pipelines import quantize
from quantcli.pipelines.graph.source import GraphSource
from quantcli.pipelines.inspect import weight_size_bytes
from quantcli.pipelines.tuning.front import pareto_front
from quantcli.pipelines.tuning.judge import judge_of
from quantcli.pipelines.tuning.loop import Loop
from quantcli.pipelines.tuning.plan import TunePlan, make_tune_plan
from quantcli.pipelines.tuning.record import Record
from quantcli.pipelines.tuning.result import TuneResult
from quantcli.pipelines.tuning.runner import Here, Runner
from quantcli.pipelines.tuning.space import Space
from quantcli.progress import Progress, Silent
from quantcli.report.front import Spot, draw_front

__all__ = ["run"]

_AXES = {"size": ("size in MB", 1e6), "latency": ("latency in ms", 1.0), "time": ("seconds to quantize", 1.0)}


def run(options: TuneOptions, progress: Progress | None = None, space: Space | None = None) -> TuneResult | TunePlan:
    """Searches; with `dry_run`, only the plan.

    Args:
        options: What was asked for.
        progress: Told of every trial.
        space: Of a pass or a workflow, where that was read already.

    Raises:
        UsageError: a space, metric or goal that cannot be, before the first trial.
        InputError: a model or data that cannot be read, a function that fails on the float model, or no trial that
            could be judged.
        InterruptedRunError: Ctrl-C; the same command goes on.
    """
    progress = progress or Silent()
    plan = make_tune_plan(options, space)
    if options.dry_run:
        return plan
    inputs = [plan.folder] if plan.kind == "checkpoint" or Path(options.model).is_dir() else [Path(options.model)]
    with create_output(
        options.output, plan=plan.identity(), inputs=inputs, force=options.force, resumable=True
    ) as partial:
        progress.plan("Tune", plan.rows())
        judge = judge_of(plan.judging(partial.state / "kept"))
        loop = Loop(plan, partial, judge.reference, progress)
        if loop.records:
            progress.note(f"continuing after {len(loop.records)} finished trials")
        runner = _runner(options, progress)
        try:
            with _heap(plan):
                ended = loop.run(runner)
        finally:
            runner.close()
        best = loop.best()
        if best is None:
            raise InputError(
                f"none of {len(loop.records)} trials could be judged; the first: {loop.records[0].reason}",
                hint="try one by `quantcli quantize`",
            )
        _place(loop, best, partial, progress)
        for note in best.notes:
            progress.warn(note)
        result = TuneResult(
            output=options.output,
            best=best,
            front=pareto_front(loop.records, plan.metric, options.minimize),
            trials=sorted(loop.records, key=lambda r: r.number),
            metric=plan.metric,
            minimize=options.minimize,
            goals=options.goals,
            sampler=plan.sampler,
            reference=dict(judge.reference),
            parent_size_bytes=_parent_bytes(plan),
            ended=ended,
            seconds=round(sum(r.seconds for r in loop.records), 1),
        )
        _commit(plan, result, partial)
    return result


def _heap(plan: TunePlan) -> AbstractContextManager[None]:
    """Trials of checkpoints collect garbage often."""
    if plan.kind != "checkpoint":
        return nullcontext()
    from quantcli.models.machine import settled_heap

    return settled_heap()


def _runner(options: TuneOptions, progress: Progress) -> Runner:
    if options.ray is None:
        return Here(progress)
    from quantcli.pipelines.tuning.cluster import Cluster

    return Cluster(options, progress)


def _place(loop: Loop, best: Record, partial: PartialFolder, progress: Progress) -> None:
    """Puts the best trial's folder in its place; it is made once more where a later one had been better for a while."""
    folder = loop.folder(best.point)
    if not folder.is_dir():
        progress.note(f"trial {best.number} is the best after all, it is made once more")
        job = loop.job(best.number, best.point)
        quantize.run(job.options, progress, kept=loop.kept)
    for path in folder.iterdir():
        target = partial.root / (path.name if path.name != "quantcli.json" else "best.json")
        if target.is_dir():  # empty, or of a run that was killed here
            shutil.rmtree(target)
        path.replace(target)


def _commit(plan: TunePlan, result: TuneResult, partial: PartialFolder) -> None:
    """The picture, the result, and the manifest, which says how the best one was made."""
    axis, unit = _AXES[result.minimize]
    chosen = {r.number for r in result.front}
    spots = [
        Spot(
            r.figures[result.minimize] / unit,
            r.figures[result.metric.name],
            r.label,
            r.number in chosen,
            r.number == result.best.number,
        )
        for r in result.trials
        if r.state == "complete"
    ]
    draw_front(spots, f"{len(result.trials)} trials, {plan.space.origin}", axis, result.metric.name, partial.root)
    write_json(partial.root / "tuning.json", result.to_dict())
    made = read_json(partial.root / "best.json", Manifest, "a manifest of ours")
    (partial.root / "best.json").unlink()
    options = public_options(asdict(plan.options)) | {"best": made.options}
    metrics = made.metrics | {"tuning": result.best.figures, "trial": result.best.number, "label": result.best.label}
    partial.commit(Manifest(made.kind, "tune", options, made.parent, metrics))


def _parent_bytes(plan: TunePlan) -> int:
    if plan.kind == "onnx":
        return GraphSource.open(plan.options.model)[0].size_bytes
    return weight_size_bytes(plan.folder)
