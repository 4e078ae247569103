"""Second moments of the tensors inside a graph: the graph is run, and what flows through it is summed batch by batch.

One Hessian per tensor, whatever number of products reads it. The session computes no more than the asked tensors need,
and of their values no more than one batch is ever in memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from quantcli.errors import InputError
from quantcli.graphs.walk import GraphTarget
from quantcli.tensors.hessian import Moments, Statistics

__all__ = ["InputMoments", "collect_moments", "combine", "levels_of", "stages_of"]

Feed = Mapping[str, np.ndarray]
"""Values of a graph's inputs by name."""


@dataclass
class InputMoments:
    """Of one tensor."""

    train: Moments
    """What solvers see."""
    held_out: Moments
    """What judges their results; of no tokens where nothing is held out."""


def stages_of(widths: Mapping[str, int], memory_bytes: int) -> list[list[str]]:
    """Cuts tensors into runs whose Hessians fit into memory together, in the order given.

    Args:
        widths: K of each tensor.
        memory_bytes: What Hessians may take; one that alone takes more is a run of its own.
    """
    stages: list[list[str]] = []
    left = 0
    for name, width in widths.items():
        needed = 2 * 4 * width * width  # train and held out, float32
        if not stages or needed > left:
            stages.append([])
            left = memory_bytes
        stages[-1].append(name)
        left -= needed
    return stages


def collect_moments(
    model: ir.Model,
    folder: Path,
    widths: Mapping[str, int],
    feeds: Iterable[Feed],
    held_out_step: int = 0,
    reference: ir.Model | None = None,
) -> dict[str, InputMoments]:
    """Runs the graph over calibration inputs.

    Args:
        model: The float graph; not changed.
        folder: Where its external data lies.
        widths: K of each tensor to watch, by name.
        feeds: Inputs, one batch at a time.
        held_out_step: Every so many batches one is held out; 0 for none.
        reference: The same graph with other weights, whose tensors are wanted too: what `model` should have come to.

    Raises:
        InputError: the graph does not run on these inputs.
    """
    given = {str(v.name) for v in model.graph.inputs}
    watched = [name for name in widths if name not in given]
    session = _session(model, folder, watched) if watched else None
    shadow = _session(reference, folder, watched) if watched and reference is not None else None
    moments = {name: InputMoments(Moments(width), Moments(width)) for name, width in widths.items()}
    for number, feed in enumerate(feeds):
        _check(model, feed)
        values = dict(feed) | _run(session, watched, feed)
        wanted = dict(feed) | _run(shadow, watched, feed) if reference is not None else {}
        judges = held_out_step > 0 and number % held_out_step == held_out_step - 1
        for name, width in widths.items():
            if values[name].shape[-1] != width:
                raise InputError(f"tensor {name!r} has {values[name].shape[-1]} columns, the weight behind it {width}")
            target = moments[name].held_out if judges else moments[name].train
            target.add(*(_tensor(found[name]) for found in (values, wanted) if found))
    return moments


def levels_of(graph: ir.Graph, targets: Sequence[GraphTarget]) -> list[list[str]]:
    """The tensors that targets are multiplied with, by how many targets the longest way to them goes through."""
    products = {use.node for target in targets for use in target.uses}
    behind: dict[ir.Value, int] = {}
    for node in graph:
        most = max((behind.get(value, 0) for value in node.inputs if value is not None), default=0)
        for value in node.outputs:
            behind[value] = most + (node in products)
    names: dict[int, list[str]] = {}
    for node in (n for n in graph if n in products and n.op_type in ("MatMul", "Gemm")):
        read = node.inputs[0]
        assert read is not None
        known = names.setdefault(behind.get(read, 0), [])
        if str(read.name) not in known:
            known.append(str(read.name))
    return [names[level] for level in sorted(names)]


def combine(parts: Sequence[InputMoments]) -> Statistics | None:
    """The statistics of a weight that reads these tensors; None where no token reached it.

    One that several products share has the mean of their Hessians, by tokens.
    """
    seen = [p for p in parts if p.train.tokens]
    if not seen:
        return None
    whole: Statistics | None = None
    for part in seen:
        held = part.held_out if part.held_out.tokens else None
        found = Statistics(
            part.train.mean(),
            part.train.tokens,
            held_out=None if held is None else held.mean(),
            held_out_tokens=0 if held is None else held.tokens,
            cross=part.train.cross(),
            held_out_cross=None if held is None else held.cross(),
        )
        whole = found if whole is None else _mix(whole, found)
    return whole


def _mix(one: Statistics, other: Statistics) -> Statistics:
    tokens, held = one.tokens + other.tokens, one.held_out_tokens + other.held_out_tokens

    def mean(a: Tensor | None, b: Tensor | None, weight: int, other_weight: int) -> Tensor | None:
        return None if a is None or b is None else (a * weight + b * other_weight) / (weight + other_weight)

    judged = mean(one.held_out, other.held_out, one.held_out_tokens, other.held_out_tokens)
    return Statistics(
        (one.hessian * one.tokens + other.hessian * other.tokens) / tokens,
        tokens,
        held_out=judged,
        held_out_tokens=held if judged is not None else 0,
        cross=mean(one.cross, other.cross, one.tokens, other.tokens),
        held_out_cross=mean(one.held_out_cross, other.held_out_cross, one.held_out_tokens, other.held_out_tokens),
    )


def _run(session: Any, watched: Sequence[str], feed: Feed) -> dict[str, np.ndarray]:
    if session is None:
        return {}
    known = {v.name for v in session.get_inputs()}
    try:
        found = session.run(watched, {name: array for name, array in feed.items() if name in known})
    except Exception as error:  # onnxruntime raises types of its own
        raise InputError(f"the graph does not run on the calibration inputs: {_line(error)}") from error
    return dict(zip(watched, found, strict=True))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def _session(model: ir.Model, folder: Path, outputs: Sequence[str]):  # type: ignore[no-untyped-def]
    """A session of the part of the graph that gives these tensors."""
    import onnxruntime

    try:
        part = model.clone()
    except RuntimeError as error:
        raise InputError(f"the graph cannot be run: {_line(error.__cause__ or error)}") from error
    values = {str(v.name): v for node in part.graph for v in node.outputs}
    missing = [name for name in outputs if name not in values]
    if missing:
        raise InputError(f"the graph computes no tensor {missing[0]!r}")
    part.graph.outputs[:] = [values[name] for name in outputs]
    RemoveUnusedNodesPass()(part)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    # weights stay in the files they are in: onnxruntime reads them from there
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        content = ir.to_proto(part).SerializeToString()
        return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own
        raise InputError(f"onnxruntime cannot open the graph: {_line(error)}") from error


def _check(model: ir.Model, feed: Feed) -> None:
    wanted, given = {str(v.name) for v in model.graph.inputs}, set(feed)
    if wanted != given:
        what = f"lack {sorted(wanted - given)[0]!r}" if wanted - given else f"have {sorted(given - wanted)[0]!r}"
        raise InputError(f"the calibration inputs {what}; the graph's inputs are {', '.join(sorted(wanted))}")


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
