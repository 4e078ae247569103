"""`quantcli quantize` on an ONNX graph: weights to codes, in the place where the float weights stood.

The steps: find the matrices, gather second moments where the rounder wants them, solve, rewrite, and read the written
file back. One Hessian per tensor; no more of them at a time than memory takes.
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from quantcli.algorithms import Step
from quantcli.data.feeds import NpzFeeds
from quantcli.errors import InputError, UsageError
from quantcli.folder import (
    Manifest,
    PartialFolder,
    create_output,
    describe_parent,
    fingerprint,
    folder_size_bytes,
    public_options,
    require_free_bytes,
    resolve_model_folder,
    write_json,
)
from quantcli.graphs.blocks import container_bits, plan_blocks
from quantcli.graphs.files import data_files, open_graph, refuse_unusable, save_graph
from quantcli.graphs.rewrite import refuse_opset, replace_matrices
from quantcli.graphs.verify import verify_weights
from quantcli.graphs.walk import GraphTarget, Selection, find_targets, prepare
from quantcli.options import GraphOptions, QuantizeOptions
from quantcli.pipelines.blockwise.solve import LayerReport
from quantcli.pipelines.graph.solve import GraphWork, solve_graph
from quantcli.pipelines.planning.plan import HELD_OUT_SHARE, Target
from quantcli.pipelines.planning.steps import resolve_steps
from quantcli.progress import Progress, Silent
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import group_index

__all__ = ["GraphResult", "locate_graph", "run"]

_HESSIAN_BYTES = 2 << 30
"""What Hessians may take together where --max-memory says nothing."""
_IDLE = (
    "target_bits", "target_size", "mixed_bits", "quantize_lm_head", "quantize_embeddings", "format", "correct_earlier",
    "dtype", "device", "evaluate", "simulation", "dry_run", "calibration", "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class GraphResult:
    """What `run` wrote and measured."""

    output: Path
    """The folder."""
    layers: list[LayerReport]
    """A report on each matrix."""
    kept: dict[str, str]
    """Why matrices stayed float, by initializer."""
    size_bytes: int
    """Of the graph and its weights."""
    parent_size_bytes: int
    """The same of the input."""
    stored_bits_per_weight: float
    """Of the quantized matrices: containers, scales and zero points."""
    seconds: float
    """How long it took."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self) | {"output": str(self.output)}


def locate_graph(model: Path) -> Path:
    """The graph that is meant: an .onnx file, or the only one of a folder.

    Raises:
        InputError: there is none, or several.
    """
    if model.is_file():
        return model
    folder = resolve_model_folder(model)
    found = sorted(folder.glob("*.onnx"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found)
        raise InputError(
            f"{folder} holds {len(found)} ONNX graphs" + (f": {names}" if names else ""),
            hint="give the .onnx file itself",
        )
    return found[0]


def run(options: QuantizeOptions, graph: GraphOptions | None = None, progress: Progress | None = None) -> GraphResult:
    """Quantizes a graph's weights.

    Raises:
        UsageError: options that do not apply to graphs, or exclude each other.
        InputError: the graph or its calibration inputs cannot be read or run.
        ResourceError: not enough disk.
    """
    graph, progress, begin = graph or GraphOptions(), progress or Silent(), time.perf_counter()
    scaling, step = _check_options(options, graph)
    path = locate_graph(Path(options.model))
    model = open_graph(path)
    data = data_files(model)
    prepare(model)
    found, kept = find_targets(
        model.graph,
        Selection(
            graph.op_types,
            graph.nodes_include,
            (*graph.nodes_exclude, *options.exclude),
            graph.quantize_last_matmul,
        ),
    )
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(kept.items())[:3])
        raise InputError(f"{path} has no weight to quantize" + (f" ({reasons})" if reasons else ""))
    targets = {t.name: _scheme_target(t, options) for t in found}
    for bits in sorted({t.scheme.bits for t in targets.values()}):
        if bits not in step.algorithm.bits:
            raise UsageError(f"{step.algorithm.name} does not make {bits} bits", hint="see `quantcli algorithms`")
        refuse_opset(model.graph, graph.encoding, bits)
    feeds = None
    if graph.calibration_inputs is not None:
        feeds = NpzFeeds.open(graph.calibration_inputs, options.calibration.num_samples)
    parent_size = path.stat().st_size + sum((path.parent / name).stat().st_size for name in data)
    identity = fingerprint(path.parent)
    names = ",".join(s.algorithm.name for s in (scaling, step) if s)
    resolved = asdict(options) | {"algorithm": names, "graph": asdict(graph)}
    plan = {"options": resolved | {"output": str(options.output)}, "parent": identity}
    progress.plan("Quantize", _rows(options, graph, path, scaling, step, targets, kept))
    if container_bits(options.bits) != options.bits:
        progress.note(f"{options.bits} bits are stored in containers of {container_bits(options.bits)}")
    require_free_bytes(options.output.absolute().parent, parent_size)
    with create_output(options.output, plan=plan, inputs=[path.parent], force=options.force) as partial:
        memory = options.max_memory // 2 if options.max_memory else _HESSIAN_BYTES
        held_out = min(HELD_OUT_SHARE, len(feeds)) if feeds and options.preset == "best" and len(feeds) > 1 else 0
        work = GraphWork(model, path.parent, found, targets, step, scaling)
        results, reports = solve_graph(work, feeds, progress, memory_bytes=memory, held_out_step=held_out)
        placements = replace_matrices(model, found, results.__getitem__, graph.encoding, graph.accuracy_level)
        partial.model.mkdir(parents=True, exist_ok=True)
        written = partial.model / path.name
        save_graph(model, written)
        progress.note("comparing every weight of the graph with what was computed")
        verify_weights(written, placements, results.__getitem__, {t.name: t.rows for t in found})
        refuse_unusable(written)
        size = folder_size_bytes(partial.model)
        if size >= parent_size:
            raise InputError(
                f"the result would take {size} bytes, the graph takes {parent_size}",
                hint="use fewer bits or larger groups",
            )
        stored = {p.weight: (p.weight, p.scales, p.zeros) for p in placements}
        initializers = open_graph(written).graph.initializers
        tensors = [initializers[n].const_value for names in stored.values() for n in names if n]
        if not Path(options.model).is_file():
            _copy_companions(path, data, partial)
        result = GraphResult(
            output=options.output,
            layers=reports,
            kept=kept,
            size_bytes=size,
            parent_size_bytes=parent_size,
            stored_bits_per_weight=8 * sum(t.nbytes for t in tensors if t) / sum(t.rows * t.columns for t in found),
            seconds=time.perf_counter() - begin,
        )
        write_json(partial.root / "report.json", result.to_dict())
        metrics = {
            "seconds": round(result.seconds, 1),
            "size_bytes": size,
            "bits_per_weight": round(result.stored_bits_per_weight, 4),
            "mean_relative_error": sum(r.relative_error for r in reports) / len(reports),
        }
        parent = describe_parent(path.parent, identity)
        partial.commit(Manifest("onnx", "quantize", public_options(resolved), parent, metrics))
    return result


def _check_options(options: QuantizeOptions, graph: GraphOptions) -> tuple[Step | None, Step]:
    """What scales, and the rounder; refuses what has no effect on a graph, before anything is read."""
    calibration = type(options.calibration)(num_samples=options.calibration.num_samples)
    for spec in fields(options):
        if spec.name in _IDLE and getattr(options, spec.name) != getattr(QuantizeOptions(".", Path()), spec.name):
            if spec.name == "calibration" and options.calibration == calibration and graph.calibration_inputs:
                continue
            raise UsageError(f"{spec.name} does not apply to ONNX graphs", hint="leave it out")
    *transforms, step = resolve_steps(options)
    for transform in transforms:
        if transform.algorithm.scope != "stage":
            raise UsageError(f"{transform.algorithm.name} does not apply to ONNX graphs", hint="use -a awq,gptq")
    if step.algorithm.codebook is not None:
        raise UsageError(
            f"{step.algorithm.name} does not apply to ONNX graphs: MatMulNBits has evenly spaced levels",
            hint="use -a kquant or gptq",
        )
    needing = [s.algorithm.name for s in (*transforms, step) if s.algorithm.calibration == "required"]
    if needing and graph.calibration_inputs is None:
        raise UsageError(f"{needing[0]} needs calibration inputs", hint="add --calibration-inputs FOLDER")
    idle = not needing and (step.algorithm.calibration == "none" or options.preset == "fast")
    if graph.calibration_inputs is not None and idle:
        raise UsageError(f"{step.algorithm.name} uses no calibration inputs", hint="leave out --calibration-inputs")
    zero = getattr(step.settings, "zero", "integer")
    if zero == "float":
        raise UsageError("zero=float does not apply to ONNX graphs, whose nodes hold whole zero points")
    if zero != "integer":
        step = replace(step, settings=replace(step.settings, zero="integer"))
    return (transforms[0] if transforms else None), step


def _scheme_target(target: GraphTarget, options: QuantizeOptions) -> Target:
    """With the scheme of the overrides whose pattern is found in the name of the weight or of one of its nodes."""
    bits, size, symmetric = options.bits, options.group_size, options.symmetric
    names = [target.name, *(use.node.name or "" for use in target.uses)]
    for override in options.overrides:
        if any(override in options.matching(name) for name in names):
            bits = bits if override.bits is None else override.bits
            size = size if override.group_size is None else override.group_size
            symmetric = symmetric if override.symmetric is None else override.symmetric
    scheme = Scheme(bits, size, symmetric)
    layout = plan_blocks(group_index(target.columns, scheme), scheme.bits)
    stored = target.rows * layout.row_bytes
    return Target(target.name, target.name, target.rows, target.columns, target.transposed, scheme, stored)


def _copy_companions(path: Path, data: set[str], partial: PartialFolder) -> None:
    """Tokenizer, configurations and whatever else stands beside the graph; links and folders are left."""
    for companion in sorted(path.parent.iterdir()):
        if companion.is_file() and not companion.is_symlink() and companion.name not in {path.name, *data}:
            shutil.copyfile(companion, partial.model / companion.name)


def _rows(
    options: QuantizeOptions,
    graph: GraphOptions,
    path: Path,
    scaling: Step | None,
    step: Step,
    targets: Mapping[str, Target],
    kept: Mapping[str, str],
) -> list[tuple[str, str]]:
    kind = "sym" if options.symmetric else "asym"
    return [
        ("model", str(path)),
        ("algorithm", ", ".join(s.algorithm.name for s in (scaling, step) if s)),
        ("scheme", f"{options.bits} bits, group size {options.group_size}, {kind}"),
        ("encoding", graph.encoding),
        ("quantized", f"{len(targets)} matrices, {sum(t.rows * t.columns for t in targets.values()) / 1e6:.1f} M"),
        *(("float", f"{name}: {why}") for name, why in kept.items()),
        ("output", str(options.output)),
    ]
