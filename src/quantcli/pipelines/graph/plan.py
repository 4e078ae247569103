"""What a run on a graph will do: which matrices, with which scheme, fed with what; what has no effect is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from quantcli.algorithms import Step
from quantcli.errors import InputError, UsageError, nearest
from quantcli.graphs.model.files import Model
from quantcli.graphs.model.opset import convert_opset, with_known_opset
from quantcli.graphs.rewrite.fold_weights import FoldedWeight
from quantcli.graphs.walk.matrices import GraphTarget, Selection, find_targets, operator_counts, prepare
from quantcli.graphs.weights.blocks import container_bits, plan_blocks, plan_codebook_blocks
from quantcli.graphs.weights.replace import needed_opset
from quantcli.options import GRAPH_OP_TYPES, CalibrationOptions, GraphOptions, QuantizeOptions
from quantcli.pipelines.graph.feeds import describe_feeds, reads_text, refuse_feeds
from quantcli.pipelines.graph.output import not_smaller
from quantcli.pipelines.graph.source import GraphSource
from quantcli.pipelines.graph.stages import Room, Stages, plan_stages
from quantcli.pipelines.planning.steps import resolve_group_size, resolve_steps
from quantcli.pipelines.planning.target import Target
from quantcli.scheme import PER_CHANNEL, Scheme
from quantcli.tensors.quantized_array import column_groups

__all__ = [
    "OPSET_HINT",
    "GraphPlan",
    "lacks_codebook_blocks",
    "plan_graph",
    "plan_weights",
    "scheme_target",
    "selection",
    "weight_encoding",
]

OPSET_HINT = "use --encoding nbits, or export the model with a later opset"
_IDLE: Mapping[str, str] = {
    "target_bits": "give each matrix its bits by --override",
    "target_size": "give each matrix its bits by --override",
    "mixed_bits": "give each matrix its bits by --override",
    "quantize_embeddings": "add Gather to --op-types",
    "format": "use --encoding nbits or qdq",
    "activations": "use -a static or dynamic",
    "kv_cache": "leave it out",
    "correct_earlier": "use --layer-wise",
    "dtype": "leave it out: what stays float keeps its type",
    "device": "leave it out: graphs are run on the CPU",
    "simulation": "leave it out",
}
"""Fields that only checkpoints have, and what to do instead."""


@dataclass(frozen=True)
class GraphPlan:
    """Everything that is decided beforehand."""

    source: GraphSource
    model: Model
    """The float graph, prepared in memory where single weights are quantized."""
    step: Step
    """The algorithm, last of its chain, with its settings."""
    options: QuantizeOptions
    """With the algorithm's name."""
    transforms: tuple[Step, ...] = ()
    """What the float weights go through first."""
    must_scale: bool = True
    """Whether a graph in which a transform can scale nothing is refused: not where only a preset brought it along."""
    found: tuple[GraphTarget, ...] = ()
    """The matrices."""
    targets: Mapping[str, Target] | None = None
    """The same with their schemes, by name; None where the algorithm takes the whole graph."""
    kept: Mapping[str, str] | None = None
    """Why matrices stay float."""
    size_bytes: int = 0
    """Estimate of the result's size, where single weights are quantized."""
    older: Model | None = None
    """The float graph in its own opset, where `model` is in a later one."""
    stages: Stages | None = None
    """The steps of calibration, where single weights are calibrated."""
    notes: tuple[str, ...] = ()
    """What there is to say of the graph."""

    @property
    def calibrates(self) -> bool:
        """Whether the graph is run on inputs."""
        if self.options.preset == "fast":
            return False
        if self.options.graph.debug_activations or self.options.graph.exclude_worst:
            return True
        used = [s.algorithm.calibration for s in (*self.transforms, self.step)]
        return "required" in used or ("optional" in used and _names_inputs(self.options))

    @property
    def holds_out(self) -> bool:
        """Whether some inputs only judge: scales, refit and sweeps are kept where they help on those too."""
        settings = self.step.settings
        return bool(self.transforms or getattr(settings, "refit", False) or getattr(settings, "sweeps", 0))

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        options, graph = self.options, self.options.graph
        settings = ", ".join(f"{k}={v}" for k, v in asdict(self.step.settings).items())
        rows = [
            ("model", f"{self.source.path} (ONNX graph, {self.source.size_bytes / 1e6:.1f} MB)"),
            *(("transform", step.algorithm.name) for step in self.transforms),
            ("algorithm", self.step.algorithm.name + (f" ({settings})" if settings else "")),
        ]
        if self.targets is not None:
            kind = "sym" if options.weight_symmetric else "asym"
            group = "one per row" if options.weight_group_size == PER_CHANNEL else str(options.weight_group_size)
            other = sum(t.scheme != self._default for t in self.targets.values())
            weights = sum(t.rows * t.columns for t in self.targets.values())
            held = sorted({t.scheme.bits for t in self.targets.values()})
            odd = [f"{b} bits lie in {container_bits(b)}-bit containers" for b in held if container_bits(b) != b]
            rows += [
                (
                    "scheme",
                    f"{options.weight_bits} bits, group size {group}, {kind}" + "".join(f"; {said}" for said in odd),
                ),
                ("encoding", str(graph.encoding)),
                *([("opset", self._opsets)] if self.older is not None else []),
                (
                    "matrices",
                    f"{len(self.targets)}, {weights / 1e6:.2f} M weights"
                    + (f" ({other} with another scheme)" if other else ""),
                ),
                *(("float", f"{name}: {why}") for name, why in (self.kept or {}).items()),
                *(("note", said) for said in self.notes),
            ]
        fed = describe_feeds(options, self.source) if self.calibrates else "none"
        return [
            *rows,
            ("calibration", fed),
            *([("statistics", self.stages.describe(Room.of(options)))] if self.stages is not None else []),
            *([("estimated size", f"{self.size_bytes / 1e6:.1f} MB")] if self.targets is not None else []),
            ("output", str(options.output)),
        ]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        plain: dict[str, Any] = {
            "model": str(self.source.path),
            "transforms": {step.algorithm.name: asdict(step.settings) for step in self.transforms},
            "algorithm": self.step.algorithm.name,
            "settings": asdict(self.step.settings),
            "calibration": describe_feeds(self.options, self.source) if self.calibrates else None,
        }
        if self.targets is not None:
            plain |= {
                "scheme": self._default.to_dict(),
                "encoding": self.options.graph.encoding,
                "matrices": len(self.targets),
                "overridden": {t.name: t.scheme.to_dict() for t in self.targets.values() if t.scheme != self._default},
                "kept": dict(self.kept or {}),
                "notes": list(self.notes),
                "estimated_size_bytes": self.size_bytes,
                "statistics": self.stages.to_dict() if self.stages is not None else None,
            }
        return plain

    @property
    def _opsets(self) -> str:
        assert self.older is not None
        return f"{self.older.opset_imports['']}, converted to {self.model.opset_imports['']}"

    @property
    def _default(self) -> Scheme:
        return Scheme(self.options.weight_bits, self.options.weight_group_size, self.options.weight_symmetric)


def plan_graph(options: QuantizeOptions) -> GraphPlan:
    """Opens the graph and settles the algorithm; `plan_weights` goes on where it rounds single weights.

    Raises:
        UsageError: options that do not apply to graphs, or exclude each other.
        InputError: the graph cannot be read.
    """
    for spec in fields(options):
        if spec.name in _IDLE and getattr(options, spec.name) != _unset(spec.name):
            flag = "--" + spec.name.replace("_", "-")
            raise UsageError(f"{flag} is for checkpoints, this is an ONNX graph", hint=_IDLE[spec.name])
    if options.quantize_lm_head and not options.graph.quantize_last_matmul:
        raise UsageError("--quantize-lm-head and --no-quantize-last-matmul exclude each other", hint="leave one out")
    *transforms, step = resolve_steps(options, "onnx")
    source, model = GraphSource.open(options.model)
    if options.evaluate and source.genai_config is None:
        raise UsageError(
            f"--evaluate scores language models, {source.path} has no genai_config.json beside it",
            hint="leave it out",
        )
    named = ",".join(s.algorithm.name for s in (*transforms, step))
    bits = options.bits if step.algorithm.kind == "graph" else options.weight_bits
    asked = replace(options, algorithm=named, bits=bits)
    return GraphPlan(source, model, step, asked, tuple(transforms), must_scale=options.algorithm is not None)


def plan_weights(plan: GraphPlan) -> GraphPlan:
    """Finds the matrices and refuses what cannot work, before anything is written.

    Raises:
        UsageError: schemes that neither the algorithm nor the encoding has, inputs that are missing or have no use.
        InputError: a graph without weights, or quantized already.
    """
    model, step, graph = plan.model, plan.step, plan.options.graph
    encoding = weight_encoding(graph)
    graph = replace(graph, encoding=encoding, op_types=graph.op_types or ("MatMul", "Gemm"))
    plan = replace(plan, options=replace(plan.options, graph=graph))
    options = plan.options
    if getattr(step.settings, "zero", None) == "auto":  # onnxruntime is fast with whole zero points only
        step = replace(step, settings=replace(step.settings, zero="integer"))
    model, oldest = with_known_opset(model)
    notes = prepare(model)
    plan = replace(plan, model=model, older=oldest)
    found, kept = find_targets(model.graph, selection(options))
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(kept.items())[:3])
        raise InputError(
            f"{plan.source.path} has no weight to quantize"
            + (f" ({reasons})" if reasons else "")
            + f": it has {operator_counts(model.graph)}; {', '.join(graph.op_types)} with constant weights are taken",
            hint="see --op-types; -a static takes more operators",
        )
    options = replace(options, group_size=resolve_group_size(options, plan.transforms, (t.columns for t in found)))
    plan = replace(plan, options=options)
    codebook = step.algorithm.codebook
    if codebook is not None:
        _refuse_codebook(step, graph)
        found = [t for t in found if not lacks_codebook_blocks(model, t, options, kept)]
        if not found:
            raise InputError(
                f"MatMulBnb4 can hold none of the weights of {plan.source.path}: {next(iter(kept.values()))}"
            )
    targets = {t.name: scheme_target(t, options, codebook) for t in found}
    if getattr(step.settings, "zero", None) == "float":
        _refuse_float_zeros(found, targets, graph)
    for bits in sorted({t.scheme.bits for t in targets.values()}):
        if bits not in step.algorithm.bits:
            raise UsageError(f"{step.algorithm.name} does not make {bits} bits", hint="see `quantcli algorithms`")
    wanted = needed_opset(encoding, (t.scheme.bits for t in targets.values()))
    if model.opset_imports.get("", 0) < wanted:
        newer = convert_opset(model, wanted, OPSET_HINT)
        found = [t for t in find_targets(newer.graph, selection(options))[0] if t.name in targets]
        plan = replace(plan, model=newer, older=oldest or model)
    saved = sum(_stored_bytes(model, t.name) - targets[t.name].stored_bytes for t in found)
    size = max(plan.source.size_bytes - saved, 0)
    if saved <= 0:
        notes.append(not_smaller(size, plan.source, options, integers=False))
    plan = replace(plan, step=step, found=tuple(found), targets=targets, kept=kept, size_bytes=size, notes=tuple(notes))
    _refuse_inputs(plan)
    return replace(plan, stages=_stages(plan)) if plan.calibrates else plan


def _stages(plan: GraphPlan) -> Stages:
    calibration, graph = plan.options.calibration, plan.model.graph
    tokens = calibration.num_samples * calibration.seq_len if reads_text(plan.options, graph) else None
    return plan_stages(
        graph,
        plan.found,
        Room.of(plan.options),
        layer_wise=plan.options.graph.layer_wise,
        held_out=plan.holds_out and calibration.num_samples > 1,
        tokens=tokens,
    )


def selection(options: QuantizeOptions) -> Selection:
    """The nodes whose weights may be quantized."""
    graph = options.graph
    excluded = (*graph.nodes_exclude, *options.exclude)
    stacks = graph.encoding == "qdq"
    return Selection(graph.op_types, graph.nodes_include, excluded, stacks, graph.quantize_last_matmul)


def weight_encoding(graph: GraphOptions) -> str:
    """The encoding; refuses what only graphs of integers have.

    Raises:
        UsageError: naming the flag.
    """
    for name in ("calibration_cache", "debug_activations", "exclude_worst", "faster"):
        if getattr(graph, name):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is for activations, only weights are quantized here", hint="use -a static")
    if graph.encoding == "qoperator":
        raise UsageError("weights alone have no operators on integers", hint="use --encoding nbits, or -a static")
    for name in graph.op_types:
        if name not in GRAPH_OP_TYPES:
            raise UsageError(f"--op-types {name!r} cannot be quantized, {nearest(name, GRAPH_OP_TYPES)}")
    if "Conv" in graph.op_types and graph.encoding != "qdq":
        raise UsageError("Conv has no operator with quantized weights", hint="add --encoding qdq")
    return graph.encoding or "nbits"


def _stored_bytes(model: Model, name: str) -> int:
    stored = model.graph.initializers[name].const_value
    if isinstance(stored, FoldedWeight):
        stored = stored.source
    return stored.nbytes if stored is not None else 0


def _refuse_inputs(plan: GraphPlan) -> None:
    options = plan.options
    if options.graph.layer_wise and not plan.calibrates:
        raise UsageError(
            f"--layer-wise runs the graph on calibration inputs, {plan.step.algorithm.name} has none",
            hint="leave it out, or use -a gptq",
        )
    if plan.calibrates:
        refuse_feeds(options, plan.model.graph, plan.source)
    elif _names_inputs(options) or options.calibration != CalibrationOptions():
        who = "preset fast" if options.preset == "fast" else plan.step.algorithm.name
        raise UsageError(f"{who} uses no calibration inputs here", hint="leave them out, or use -a gptq")
    read = plan.calibrates and reads_text(options, plan.model.graph)
    if options.trust_remote_code and not (read or options.evaluate):
        raise UsageError("--trust-remote-code is for tokenizers, none is read here", hint="leave it out")


def _names_inputs(options: QuantizeOptions) -> bool:
    text = options.calibration
    given = options.graph.calibration_inputs or options.graph.user_script
    return bool(given or text.data or text.data_name)


def _unset(name: str) -> Any:
    spec = next(f for f in fields(QuantizeOptions) if f.name == name)
    return spec.default_factory() if callable(spec.default_factory) else spec.default


def _refuse_codebook(step: Step, graph: GraphOptions) -> None:
    """Refuses what MatMulBnb4 does not have.

    Raises:
        UsageError: tables, another encoding, nested scales.
    """
    name = step.algorithm.name
    if graph.encoding != "nbits":
        raise UsageError(f"{name} is for MatMulBnb4, DequantizeLinear has no codebook", hint="use --encoding nbits")
    if graph.accuracy_level:
        raise UsageError(f"--accuracy-level is an attribute of MatMulNBits, {name} writes MatMulBnb4")
    if "Gather" in graph.op_types:
        raise UsageError(f"{name} is for MatMulBnb4, which multiplies", hint="leave Gather out of --op-types")
    if getattr(step.settings, "double_quant", False):
        raise UsageError("MatMulBnb4 has float32 scales, double_quant does not apply", hint="leave it out")


def lacks_codebook_blocks(model: Model, target: GraphTarget, options: QuantizeOptions, kept: dict[str, str]) -> bool:
    """Whether MatMulBnb4 cannot hold a matrix; the reason is noted."""
    stored = model.graph.initializers[target.name].const_value
    if stored is not None and stored.dtype.name != "FLOAT":
        kept[target.name] = f"MatMulBnb4 has float32 scales, the weight is {stored.dtype.name}"
    elif plan_codebook_blocks(column_groups(target.columns, Scheme(4, options.weight_group_size))) is None:
        kept[target.name] = f"its {target.columns} columns are no multiple of 16, the smallest block of MatMulBnb4"
    return target.name in kept


def _refuse_float_zeros(found: Sequence[GraphTarget], targets: Mapping[str, Target], graph: GraphOptions) -> None:
    """MatMulNBits has fractions as zero points in containers of 2 and 4 bits; nothing else has."""
    if graph.encoding != "nbits":
        raise UsageError("zero=float does not apply to DequantizeLinear", hint="use --encoding nbits, or zero=integer")
    for target in found:
        scheme = targets[target.name].scheme
        if any(use.node.op_type == "Gather" for use in target.uses):
            raise UsageError("zero=float does not apply to GatherBlockQuantized", hint="leave Gather out of --op-types")
        if container_bits(scheme.bits) > 4:
            raise UsageError(f"zero=float is for 1 to 4 bits, not {scheme.bits}", hint="use zero=integer")
        if plan_blocks(column_groups(target.columns, scheme), scheme.bits).columns is not None:
            raise UsageError(
                f"zero=float needs groups of whole blocks, {scheme.group_size} columns are none",
                hint="use --group-size 32, 64 or 128",
            )


def scheme_target(target: GraphTarget, options: QuantizeOptions, codebook: str | None = None) -> Target:
    """With the scheme of the overrides whose pattern is found in the name of the weight or of one of its nodes."""
    scheme = Scheme(options.weight_bits, options.weight_group_size, options.weight_symmetric, codebook=codebook)
    names = [target.name, *(use.node.name or "" for use in target.uses)]
    for override in options.matching(*names):
        scheme = replace(scheme, **override.scheme)
    group = column_groups(target.columns, scheme)
    layout = (None if codebook is None else plan_codebook_blocks(group)) or plan_blocks(group, scheme.bits)
    stored = target.rows * layout.row_bytes
    shape = target.rows, target.columns, target.transposed
    return Target(target.name, target.name, *shape, scheme, stored, options.clip_ratio(*names))
