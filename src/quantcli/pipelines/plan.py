"""What a quantize run will do, decided before it begins: algorithm, scheme of every linear, size, memory, time."""

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from quantcli import algorithms
from quantcli.algorithms import KEEP_FLOAT, Algorithm, Step
from quantcli.data.sampling import SamplingKey, estimate_sampling
from quantcli.errors import InputError, ResourceError, UsageError
from quantcli.folder import fingerprint, require_free_bytes
from quantcli.formats import CODECS, gptq
from quantcli.formats.codec import Codec
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.experts import Expert
from quantcli.models.layout import Layout, find_layout, is_transposed, weight_shape
from quantcli.models.machine import compute_dtype, free_bytes, matmul_flops, pick_device
from quantcli.models.online import OnlineRotations, refuse_online, rotate_inputs
from quantcli.models.rotate import RotatedCheckpoint, refuse_unrotatable, rotate
from quantcli.models.skeleton import build_skeleton, check_counts, check_tensors, disk_name, load_config
from quantcli.models.source import locate_model
from quantcli.options import BUILTIN, SELF, CalibrationOptions, QuantizeOptions
from quantcli.pipelines.budget import Budget, Choice, held_as, make_budget
from quantcli.pipelines.train_rotation import TrainingCost, training_cost
from quantcli.scheme import PER_CHANNEL, Scheme
from quantcli.tensors.hadamard import Rotation

__all__ = ["DTYPES", "EMBEDDING_SCHEME", "MEASURED_TOKENS", "Plan", "Target", "make_plan", "with_choice"]

EMBEDDING_SCHEME = Scheme(bits=8, group_size=64, lowest_zero=gptq.LOWEST_ZERO)
HELD_OUT_SHARE = 8
"""One row in so many is held out where candidates compete."""
MEASURED_TOKENS = 1024
"""On so many the sensitivity of the linears is measured where bits are mixed."""
_PIECE = 128
"""Tokens that the model writes in one go where its text only judges."""
_BEST = {"refit": "true", "sweeps": "2"}
_PRESETS: Mapping[str, tuple[str, dict[str, str]]] = {
    "fast": ("kquant", {}),
    "balanced": ("gptq", {}),
    "best": ("gptq", _BEST),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BANDWIDTH = 1.2e10  # bytes a second that an ordinary two-core machine reads from memory
_EFFICIENCY = 0.55  # share of the matrix-product rate that whole runs reach


@dataclass(frozen=True)
class Target:
    """One matrix that will be quantized."""

    name: str
    """Module path."""
    disk: str
    """Name of its weight in the files."""
    rows: int
    columns: int
    transposed: bool
    """Whether the file holds [K, N] (GPT-2's Conv1D)."""
    scheme: Scheme
    stored_bytes: int
    """What it takes on disk."""

    @property
    def stem(self) -> str:
        """The disk name without `.weight`."""
        return self.disk.removesuffix(".weight")


@dataclass(frozen=True)
class Plan:
    """Everything that is decided beforehand."""

    folder: Path
    transforms: tuple[Step, ...]
    """What the float model goes through first."""
    algorithm: Algorithm
    """The rounder."""
    settings: Any
    options: QuantizeOptions
    """With the format that was chosen."""
    checkpoint: Checkpoint
    skeleton: Any
    layout: Layout
    default: Scheme
    targets: dict[str, Target]
    """By module path: block linears in order, then the head where it is quantized."""
    embedding: Target | None
    untie_head: bool
    """Whether the head gets codes of its own although it shares the embedding's matrix."""
    source: str | None
    """self, builtin or data; None where no statistics are gathered."""
    device: torch.device
    dtype: torch.dtype
    """What blocks are run in."""
    keep_paused: bool
    size_bytes: int
    peak_bytes: int
    seconds: float
    model_digest: str
    why_source: str = ""
    judges: int = 0
    """Rows of the model's own text that only judge."""
    online: OnlineRotations | None = None
    """Rotations that the result's weights expect at run time."""
    budget: Budget | None = None
    """What may be spent, where bits are mixed."""
    choice: Choice | None = None
    """How it is spent, once that has been measured."""
    training: TrainingCost | None = None
    """What training rotations will take, where there are some to train."""

    @property
    def codec(self) -> Codec:
        """How linears are stored."""
        assert self.options.format is not None
        return CODECS[self.options.format]

    def float_dtype(self, stored: torch.dtype) -> torch.dtype:
        """What a float tensor of the input is written in."""
        return DTYPES.get(self.options.dtype, stored)

    @property
    def judge_text(self) -> CalibrationOptions:
        """How that text is written: many short pieces, joined into rows; a step of writing reads all weights."""
        return _judge_text(self.options.calibration, self.judges)

    @property
    def calibrates(self) -> bool:
        """Whether statistics are gathered."""
        return self.source is not None and _gathers(self)

    @property
    def trained(self) -> Step | None:
        """The transform whose rotations are trained before blocks are quantized."""
        return next((step for step in self.transforms if _is_trained(step)), None)

    @property
    def measured_text(self) -> CalibrationOptions:
        """The text on which sensitivities are measured where the algorithm itself reads none."""
        calibration = self.options.calibration
        given = calibration.data or (None if calibration.data_name else BUILTIN)
        return replace(calibration, data=given, num_samples=self.measured_rows)

    @property
    def measured_rows(self) -> int:
        """Rows of text on which sensitivities are measured."""
        rows = max(1, MEASURED_TOKENS // self.options.calibration.seq_len)
        return min(rows, self.options.calibration.num_samples)

    @property
    def holds_out(self) -> bool:
        """Whether some rows only judge."""
        improves = bool(getattr(self.settings, "refit", False) or getattr(self.settings, "sweeps", 0))
        return self.calibrates and (improves or self.scaling is not None or self.options.correct_earlier)

    @property
    def scaling(self) -> Step | None:
        """The transform that works on each input."""
        return next((step for step in self.transforms if step.algorithm.scope == "stage"), None)

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        calibration = self.options.calibration
        text = "none"
        if self.source is not None:
            named = {"self": "text that the model writes itself", "builtin": "Python's documentation"}
            text = named.get(self.source or "", calibration.data or calibration.data_name or "")
            text += f", {calibration.num_samples} rows of {calibration.seq_len} tokens{self.why_source}"
            text += f"; {self.judges} rows of the model's own judge" if self.judges else ""
        rows = [
            ("model", f"{self.folder} ({type(self.skeleton).__name__}, {self.checkpoint.size_bytes / 1e6:.0f} MB)"),
            *(("transform", _words(step)) for step in self.transforms),
            *([("runs in", "quantcli only: rotations are computed at run time")] if self.online else []),
            *(self._rounding_rows() if self.targets else [("algorithm", "none: the result is a float model")]),
            ("calibration", text),
            *self._training_rows(),
            ("device", f"{self.device}, {str(self.dtype).removeprefix('torch.')}"),
            ("estimated size", f"{self.size_bytes / 1e6:.0f} MB"),
            ("estimated peak memory", f"{self.peak_bytes / 1e9:.2f} GB"),
            ("estimated time", f"{self.seconds:.0f} s"),
        ]
        if self.options.simulation.simulates:
            rows.append(("evaluated with", self.options.simulation.describe()))
        return rows

    def _training_rows(self) -> list[tuple[str, str]]:
        if self.training is None:
            return []
        cost = self.training
        return [("training", f"about {cost.seconds:.0f} s and {cost.peak_bytes / 1e9:.2f} GB, the whole float model")]

    def _rounding_rows(self) -> list[tuple[str, str]]:
        scheme = self.default
        bits = str(scheme.bits) if self.budget is None else ", ".join(map(str, self.budget.widths))
        group = "one per row" if scheme.group_size == PER_CHANNEL else str(scheme.group_size)
        kind = scheme.codebook or ("sym" if scheme.symmetric else "asym")
        return [
            ("algorithm", _words(Step(self.algorithm, self.settings))),
            ("scheme", f"{bits} bits, group size {group}, {kind}"),
            *([("mixed bits", self._mixed_words(self.budget))] if self.budget is not None else []),
            ("format", self.codec.name),
            ("linears", f"{len(self.targets)}{self._exceptions()}"),
        ]

    def _mixed_words(self, budget: Budget) -> str:
        text = "the calibration text"
        if self.source is None:
            text = self.measured_text.data or self.measured_text.data_name or ""
            text = {BUILTIN: "Python's documentation", SELF: "text that the model writes"}.get(text, text)
        return f"{budget.summary()}; which linear gets which is measured first, on {self.measured_rows} rows of {text}"

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "model": str(self.folder),
            "transforms": {step.algorithm.name: asdict(step.settings) for step in self.transforms},
            "algorithm": self.algorithm.name,
            "settings": asdict(self.settings),
            "scheme": self.default.to_dict(),
            "linears": len(self.targets),
            "overridden": {t.name: t.scheme.to_dict() for t in self.targets.values() if t.scheme != self.default},
            "online_rotations": None if self.online is None else asdict(self.online),
            "mixed_bits": None if self.budget is None else self.budget.to_dict(self.choice),
            "calibration": self.source,
            "device": str(self.device),
            "estimated_size_bytes": self.size_bytes,
            "estimated_peak_bytes": self.peak_bytes,
            "estimated_seconds": round(self.seconds, 1),
            "training": None if self.training is None else asdict(self.training),
        }

    def identity(self) -> dict[str, Any]:
        """What decides the written codes: a run resumes only what has the same."""
        options = asdict(self.options)
        for name in ("output", "force", "dry_run", "evaluate", "simulation", "max_memory", "model"):
            options.pop(name)
        return options | {"model_digest": self.model_digest, "source": self.source, "dtype_run": str(self.dtype)}

    def _exceptions(self) -> str:
        other = sum(t.scheme != self.default for t in self.targets.values())
        left = len(self.layout.linears) - sum(name in self.targets for name in self.layout.linears)
        parts = [f"{other} with another scheme"] * bool(other) + [f"{left} left float"] * bool(left)
        return f" ({', '.join(parts)})" if parts else ""


def make_plan(options: QuantizeOptions) -> Plan:
    """Resolves every default and refuses what cannot work, before anything is written.

    Raises:
        UsageError: options that contradict each other.
        InputError: a model that cannot be quantized.
        ResourceError: not enough memory or disk.
    """
    *transforms, rounder = _resolve_steps(options)
    algorithm, settings = rounder.algorithm, rounder.settings
    options = replace(options, format=_resolve_format(options.format, algorithm))
    codec = CODECS[options.format or ""]
    folder = locate_model(options.model)
    checkpoint = Checkpoint.open(folder)
    _refuse_quantized(checkpoint, folder)
    config = load_config(folder, options.trust_remote_code)
    check_counts(config, checkpoint.entries, folder)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    rotation = next((step for step in transforms if step.algorithm.scope == "model"), None)
    if rotation is not None:
        config.tie_word_embeddings = False
    skeleton = build_skeleton(folder, config, options.trust_remote_code)
    layout = find_layout(skeleton)
    online = OnlineRotations.of(checkpoint.config)
    if rotation is not None:
        refuse_online(checkpoint.config, folder, "which cannot be taken in twice")
        refuse_unrotatable(skeleton)
        if getattr(rotation.settings, "online", False):
            online = OnlineRotations(rotation.settings.rotate_mode, rotation.settings.rotation_seed)
        checkpoint = _rotated(checkpoint, skeleton, layout, rotation, online)
    if online is not None:
        rotate_inputs(skeleton, layout.linears, online, in_place=True)
    check_tensors(skeleton, checkpoint.entries, folder)
    default = Scheme(
        options.bits,
        options.group_size,
        options.symmetric,
        codec.lowest_zero,
        algorithm.codebook,
        getattr(settings, "double_quant", False),
    )
    targets = _targets(options, skeleton, layout, checkpoint, default, algorithm)
    settings = _with_zero_points(settings, codec, targets)
    experts = {n for n in targets if isinstance(skeleton.get_submodule(n.rpartition(".")[0]), Expert)}
    _refuse_format(codec, options, targets, default, Step(algorithm, settings), layout, experts)
    untie = tied and (layout.head in targets or rotation is not None)
    embedding = _embedding_target(options, skeleton, layout, checkpoint)
    device = pick_device(options.device)
    first = disk_name(f"{layout.linears[0]}.weight", skeleton, checkpoint.entries)
    stored = checkpoint.entries[first].dtype if first is not None else torch.float32
    dtype = compute_dtype(device, stored)
    base = Plan(
        folder, tuple(transforms), algorithm, settings, options, checkpoint, skeleton, layout, default, targets,
        embedding, untie, source=None, device=device, dtype=dtype, keep_paused=True,
        size_bytes=0, peak_bytes=0, seconds=0.0, model_digest=fingerprint(folder), online=online,
    )  # fmt: skip
    plan = _with_source(_with_training(base), config)
    plan = replace(plan, size_bytes=_size_bytes(plan))
    if options.mixes:
        plan = _with_budget(plan)
    return _with_memory(plan)


def _with_budget(plan: Plan) -> Plan:
    """Checks the target; size and time are estimated anew."""
    budget = make_budget(plan)
    low, high = ({name: pick(sizes) for name, sizes in budget.sizes.items()} for pick in (min, max))
    ends = [_size_bytes(_with_bits(plan, bits)) for bits in (low, high)]
    spent = [budget.achieved(bits) for bits in (low, high)]
    share = (min(budget.target, spent[1]) - spent[0]) / max(spent[1] - spent[0], 1e-9)
    size = int(ends[0] + share * (ends[1] - ends[0]))
    tokens = plan.measured_rows * plan.options.calibration.seq_len
    weights = sum(t.rows * t.columns for t in plan.targets.values())
    head = 2 * tokens * math.prod(plan.skeleton.get_submodule(plan.layout.embedding).weight.shape)
    blocks = len(plan.layout.blocks)
    flops = 2 * tokens * weights * (blocks / 2 + 7 + len(budget.widths)) + head * (blocks + 1)
    rate = matmul_flops(plan.device, plan.dtype) * _EFFICIENCY
    return replace(plan, budget=budget, size_bytes=size, seconds=plan.seconds + flops / rate + weights / 1e7)


def with_choice(plan: Plan, choice: Choice) -> Plan:
    """The plan with the bits that were chosen; the commonest width becomes that of the whole model."""
    plan = _with_bits(plan, choice.bits)
    commonest = max(choice.distribution(), key=lambda part: (part["linears"], part["bits"]))["bits"]
    plan = replace(plan, choice=choice, default=replace(plan.default, bits=commonest))
    return replace(plan, size_bytes=_size_bytes(plan))


def _with_bits(plan: Plan, bits: Mapping[str, int]) -> Plan:
    packed = plan.codec.packed_bytes
    targets = {}
    for name, target in plan.targets.items():
        scheme = replace(target.scheme, bits=bits[name])
        size = target.stored_bytes if packed is None else packed(target.rows, target.columns, scheme)
        targets[name] = replace(target, scheme=scheme, stored_bytes=size)
    return replace(plan, targets=targets)


def _rotated(
    checkpoint: Checkpoint, skeleton: Any, layout: Layout, step: Step, online: OnlineRotations | None
) -> RotatedCheckpoint:
    """The checkpoint through the rotations of a step; through none as long as they are to be trained."""
    config = skeleton.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if _is_trained(step):
        stream, head = Rotation.identity(config.hidden_size), Rotation.identity(head_dim)
    else:
        stream, head = step.algorithm.run(config.hidden_size, head_dim, step.settings)
    return rotate(checkpoint, skeleton, layout, stream, [head] * len(layout.blocks), online)


def _is_trained(step: Step) -> bool:
    return step.algorithm.scope == "model" and step.algorithm.calibration == "required"


def _with_training(plan: Plan) -> Plan:
    """Estimates what training rotations takes, and refuses what cannot fit.

    Raises:
        ResourceError: the float model does not fit in memory.
    """
    if plan.trained is None:
        return plan
    calibration = plan.options.calibration
    if calibration.num_samples < 2:
        raise UsageError(
            f"{plan.trained.algorithm.name} takes two calibration rows or more, one of them to judge, got 1",
            hint="raise --num-samples",
        )
    rate = matmul_flops(plan.device)
    cost = training_cost(plan.skeleton, plan.layout, plan.trained.settings, calibration.seq_len, rate)
    budget = plan.options.max_memory or free_bytes(plan.device)
    if cost.peak_bytes > budget:
        raise ResourceError(
            f"training rotations needs about {cost.peak_bytes / 1e9:.2f} GB of memory for the whole float model, "
            f"{budget / 1e9:.2f} GB are free",
            hint="use quarot, whose rotations need no training",
        )
    return replace(plan, training=cost)


def _words(step: Step) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in asdict(step.settings).items())
    return step.algorithm.name + (f" ({settings})" if settings else "")


def _resolve_steps(options: QuantizeOptions) -> list[Step]:
    """Transforms and, last, the rounder, each with its settings."""
    preset = options.preset
    if preset is None and options.algorithm is None:
        preset = "balanced"
    name, preset_settings = _PRESETS[preset] if preset else ("", {})
    chain = algorithms.find_chain(options.algorithm or name)
    rounder = chain[-1]
    if "checkpoint" not in rounder.inputs:
        raise UsageError(
            f"{rounder.name} quantizes ONNX graphs, not checkpoints",
            hint=f"quantcli capture-onnx-graph -m {options.model} -o GRAPH, then quantcli quantize -m GRAPH "
            f"-a {rounder.name}",
        )
    if preset and name != rounder.name:
        named = options.algorithm or ""
        transforms = ",".join(a.name for a in chain[:-1])
        raise UsageError(
            f"preset {preset} is a setting of {name}, not of {rounder.name}",
            hint=f"leave out --preset, or use -a {transforms + ',' if transforms else ''}{name}"
            + (f" instead of {named}" if named else ""),
        )
    for algorithm in chain:
        if options.bits not in algorithm.bits:
            allowed = ", ".join(map(str, algorithm.bits))
            raise UsageError(
                f"{algorithm.name} makes {allowed} bits, not {options.bits}", hint="see `quantcli algorithms`"
            )
    if rounder is KEEP_FLOAT:
        _refuse_idle_rounding(options, chain[-2].name)
    if rounder.codebook and (options.symmetric or any(o.symmetric is not None for o in options.overrides)):
        raise UsageError(f"{rounder.name} has no zero points, sym or asym would have no effect", hint="leave it out")
    steps = algorithms.make_steps(chain, {**preset_settings, **options.settings})
    _refuse_idle_calibration(options, preset, chain)
    if options.correct_earlier and rounder.calibration != "required":
        raise UsageError(f"--correct-earlier is a step of gptq, {rounder.name} has none", hint="use -a gptq")
    return steps


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


def _resolve_format(asked: str | None, algorithm: Algorithm) -> str:
    """The format that was asked for, or the algorithm's own."""
    if asked is None:
        return algorithm.formats[0]
    if asked not in algorithm.formats:
        able = [a.name for a in algorithms.ALGORITHMS.values() if a.kind == "rounder" and asked in a.formats]
        raise UsageError(
            f"format {asked} cannot hold what {algorithm.name} makes: {', '.join(algorithm.formats)} can",
            hint=f"use --format {algorithm.formats[0]}, or -a {' or '.join(able)}",
        )
    return asked


def _refuse_idle_calibration(options: QuantizeOptions, preset: str | None, chain: Sequence[Algorithm]) -> None:
    """No flag without effect: text options where no text is read."""
    calibration = options.calibration
    if calibration.data_split != CalibrationOptions.data_split and calibration.data_name is None:
        raise UsageError("--data-split is for --data-name", hint="leave it out")
    algorithm, needs = chain[-1], any(a.calibration == "required" for a in chain)
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


def _refuse_quantized(checkpoint: Checkpoint, folder: Path) -> None:
    found = checkpoint.config.get("quantization_config")
    method = found.get("quant_method", "unknown method") if isinstance(found, dict) else None
    if method is None and any(name.endswith((".qweight", ".weight_packed", ".absmax")) for name in checkpoint.entries):
        method = "packed weights"
    if method is not None:
        raise InputError(f"{folder} is already quantized ({method})", hint="quantize the original model instead")


def _targets(
    options: QuantizeOptions,
    skeleton: Any,
    layout: Layout,
    checkpoint: Checkpoint,
    default: Scheme,
    algorithm: Algorithm,
) -> dict[str, Target]:
    names = list(layout.linears)
    if options.quantize_lm_head:
        if layout.head is None:
            raise InputError(
                f"{type(skeleton).__name__} has no output head to quantize", hint="drop --quantize-lm-head"
            )
        names.append(layout.head)
    if algorithm is KEEP_FLOAT:
        return {}
    used: set[str] = set()
    targets = {}
    for name in names:
        excluded = [p for p in options.exclude if re.search(p, name)]
        used.update(excluded)
        if excluded:
            continue
        scheme = default
        for override in options.matching(name):
            used.add(override.pattern)
            changes = {k: v for k in ("bits", "group_size", "symmetric") if (v := getattr(override, k)) is not None}
            scheme = replace(scheme, **changes)
        if scheme.bits not in algorithm.bits:
            raise UsageError(
                f"{algorithm.name} makes {algorithm.bits} bits, not {scheme.bits} as overridden for {name}"
            )
        module = skeleton.get_submodule(name)
        rows, columns = weight_shape(module)
        if columns < scheme.group_size:
            scheme = replace(scheme, group_size=PER_CHANNEL)
        disk = source = disk_name(f"{name}.weight", skeleton, checkpoint.entries)
        if disk is None and name == layout.head:  # tied: read from the embedding, written under its own name
            disk, source = f"{name}.weight", disk_name(f"{layout.embedding}.weight", skeleton, checkpoint.entries)
        if disk is None or source is None:
            raise InputError(f"tensor {name}.weight is missing from {checkpoint.folder}")
        size = _stored_bytes(options, rows, columns, scheme, checkpoint.entries[source].dtype)
        targets[name] = Target(name, disk, rows, columns, is_transposed(module), scheme, size)
    for pattern in {*options.exclude, *(o.pattern for o in options.overrides)} - used:
        raise UsageError(f"no linear is named like {pattern!r}", hint="see the names with --dry-run --json")
    if not targets:
        raise UsageError("--exclude leaves nothing to quantize")
    return targets


def _with_zero_points(settings: Any, codec: Codec, targets: Mapping[str, Target]) -> Any:
    """The rounder's settings, its zero points chosen by the format where it leaves them open."""
    chosen = getattr(settings, "zero", None)
    if chosen is None or not targets:
        return settings
    fixed = all(target.scheme.symmetric for target in targets.values())
    if chosen == "float" and fixed:
        raise UsageError("--sym fixes the zero points, zero=float would have no effect", hint="leave one of them out")
    if chosen == "auto":
        return replace(settings, zero="float" if codec.float_zeros and not fixed else "integer")
    return settings


def _stored_bytes(options: QuantizeOptions, rows: int, columns: int, scheme: Scheme, stored: torch.dtype) -> int:
    packed = CODECS[options.format or ""].packed_bytes
    if packed is None:
        return rows * columns * DTYPES.get(options.dtype, stored).itemsize
    return packed(rows, columns, scheme)


def _refuse_format(
    codec: Codec,
    options: QuantizeOptions,
    targets: Mapping[str, Target],
    default: Scheme,
    rounder: Step,
    layout: Layout,
    experts: Set[str],
) -> None:
    """What the format cannot hold exactly, with the formats that can."""
    formats = rounder.algorithm.formats
    for target in targets.values():
        held = held_as(target, rounder.settings, default=target.scheme == default, expert=target.name in experts)
        why = codec.why_not(held)
        if why is None and target.name == layout.head and codec.name == "awq":
            why = "readers of it expect a float output head"
        if why is not None:
            others = [n for n in formats if n != codec.name and CODECS[n].why_not(held) is None]
            raise UsageError(
                f"format {codec.name} cannot hold {target.name}: {why}", hint=f"use --format {' or '.join(others)}"
            )
    if options.quantize_embeddings and codec.name != "gptq":
        hint = "use --format gptq" if "gptq" in formats else "leave --quantize-embeddings out"
        raise UsageError(f"format {codec.name} has no quantized embedding", hint=hint)


def _embedding_target(options: QuantizeOptions, skeleton: Any, layout: Layout, checkpoint: Checkpoint) -> Target | None:
    if not options.quantize_embeddings:
        return None
    rows, columns = skeleton.get_submodule(layout.embedding).weight.shape
    disk = disk_name(f"{layout.embedding}.weight", skeleton, checkpoint.entries)
    if disk is None:
        raise InputError(f"tensor {layout.embedding}.weight is missing from {checkpoint.folder}")
    size = gptq.packed_bytes(rows, columns, EMBEDDING_SCHEME)
    return Target(layout.embedding, disk, rows, columns, False, EMBEDDING_SCHEME, size)


def _flops(plan: Plan) -> float:
    """Operations of a calibrated run: forwards, Hessians, factors and solves."""
    calibration = plan.options.calibration
    tokens = calibration.num_samples * calibration.seq_len
    forward = hessians = solves = 0.0
    seen: set[tuple[str, int, int]] = set()
    for target in plan.targets.values():
        forward += 2 * target.rows * target.columns * tokens
        solves += 4 * target.rows * target.columns**2
        # linears of one block with the same inputs are counted once: a guess by shape, good enough for an estimate
        block = re.sub(r"[^.]+$", "", target.name)
        if (block, target.columns, 0) not in seen:
            seen.add((block, target.columns, 0))
            hessians += 1.2 * tokens * target.columns**2 + target.columns**3
            for step in plan.transforms:  # a search over grid points, each scored under the Hessian
                points, rows = getattr(step.settings, "n_grid", 0), getattr(step.settings, "rows", 0)
                solves += 2 * points * min(rows, target.rows) * target.columns**2
    if plan.options.correct_earlier:
        forward, hessians = 2 * forward, 2.7 * hessians
    return forward + hessians + solves


def _with_source(plan: Plan, config: Any) -> Plan:
    """Chooses the calibration text and estimates the time."""
    weights = sum(t.rows * t.columns for t in plan.targets.values())
    training = plan.training.seconds if plan.training is not None else 0.0
    solving = 2 + weights / 2.5e7 + training
    if not _wants_data(plan):
        return replace(plan, source=None, seconds=solving)
    rate = matmul_flops(plan.device, plan.dtype)
    if _gathers(plan):
        solving = 3 + weights / 2e7 + _flops(plan) / (rate * _EFFICIENCY) + training
    calibration = plan.options.calibration
    given = calibration.data or calibration.data_name
    named = BUILTIN if given == BUILTIN else "data"
    parameters = sum(e.size_bytes // e.dtype.itemsize for e in plan.checkpoint.entries.values())
    bandwidth = _BANDWIDTH if plan.device.type == "cpu" else 1e12
    budget = plan.options.max_memory or free_bytes(plan.device)

    def estimate(text: CalibrationOptions) -> tuple[float, int]:
        if SamplingKey(plan.model_digest, text.num_samples, text.seq_len, text.seed).file.is_file():
            return 0.0, 0  # written before, and kept
        return estimate_sampling(config, parameters, text.num_samples, text.seq_len, rate, bandwidth)

    if given and given != SELF:
        judges = max(1, calibration.num_samples // HELD_OUT_SHARE) if plan.options.preset == "best" else 0
        sampling, needed = estimate(_judge_text(calibration, judges)) if judges else (0.0, 0)
        if needed > budget or sampling > solving:
            judges, sampling = 0, 0.0
        return replace(plan, source=named, seconds=solving + sampling, judges=judges)
    sampling, needed = estimate(calibration)
    if given != SELF:
        if needed > budget:
            return replace(
                plan, source=BUILTIN, seconds=solving, why_source="; writing its own would not fit in memory"
            )
        if sampling > 1.5 * solving:
            return replace(plan, source=BUILTIN, seconds=solving, why_source="; writing its own would take longer")
    elif needed > budget:
        raise ResourceError(
            f"--data self needs about {needed / 1e9:.1f} GB for the whole model, {budget / 1e9:.1f} GB are free",
            hint="use --data builtin or --data FILE",
        )
    wait = f", about {sampling:.0f} s to write" if sampling else ", written before"
    return replace(plan, source=SELF, seconds=solving + sampling, why_source=wait)


def _judge_text(calibration: CalibrationOptions, rows: int) -> CalibrationOptions:
    pieces = calibration.seq_len // _PIECE if calibration.seq_len % _PIECE == 0 else 1
    return CalibrationOptions(
        SELF, num_samples=rows * pieces, seq_len=calibration.seq_len // pieces, seed=calibration.seed
    )


def _wants_data(plan: Plan) -> bool:
    """Whether text is read."""
    return plan.trained is not None or _gathers(plan)


def _gathers(plan: Plan) -> bool:
    """Whether statistics are gathered block by block; kquant uses them only where text was named."""
    if not plan.targets:
        return False
    used = [plan.algorithm.calibration, *(s.algorithm.calibration for s in plan.transforms if not _is_trained(s))]
    if "required" in used:
        return True
    named = bool(plan.options.calibration.data or plan.options.calibration.data_name)
    return "optional" in used and named and plan.options.preset != "fast"


def _size_bytes(plan: Plan) -> int:
    """Bytes of the written weights."""
    replaced = {t.disk for t in plan.targets.values()} | ({plan.embedding.disk} if plan.embedding else set())
    total = sum(t.stored_bytes for t in plan.targets.values())
    total += plan.embedding.stored_bytes if plan.embedding else 0
    for name, entry in plan.checkpoint.entries.items():
        if name not in replaced:
            count = entry.size_bytes // entry.dtype.itemsize
            total += count * (plan.float_dtype(entry.dtype) if entry.dtype.is_floating_point else entry.dtype).itemsize
    return total


def _with_memory(plan: Plan) -> Plan:
    """Estimates the peak, chooses whether paused forwards are kept, refuses what cannot fit."""
    budget = plan.options.max_memory or free_bytes(plan.device)
    if not plan.targets:  # a shard under way, and one tensor more
        largest = max(e.size_bytes for e in plan.checkpoint.entries.values())
        return _checked(replace(plan, peak_bytes=4 * largest + 200_000_000), budget)
    itemsize = plan.dtype.itemsize
    first = plan.layout.blocks[0] + "."
    block = sum(t.rows * t.columns for t in plan.targets.values() if t.name.startswith(first)) * itemsize
    widest = max(plan.targets.values(), key=lambda t: t.columns)
    outside = plan.checkpoint.entries[
        disk_name(f"{plan.layout.embedding}.weight", plan.skeleton, plan.checkpoint.entries)
        or next(iter(plan.checkpoint.entries))
    ].size_bytes
    largest = max(t.rows * t.columns for t in plan.targets.values())
    measuring = _measuring_bytes(plan, block, outside)
    if not plan.calibrates:
        # one matrix in float32, its importance, codes and the shard under way
        peak = max(block + 16 * largest, 2 * outside, measuring)
        return _checked(replace(plan, peak_bytes=int(peak) + 200_000_000), budget)
    calibration = plan.options.calibration
    streams = 2 if plan.options.correct_earlier else 1
    tokens = calibration.num_samples * calibration.seq_len
    hidden = plan.skeleton.config.get_text_config().hidden_size
    batch = min(calibration.batch_size, calibration.num_samples) * calibration.seq_len
    inside = block / hidden + 4 * widest.columns * itemsize  # what one token's forward holds at its widest
    matrices = 4 + 2 * (plan.options.correct_earlier or plan.holds_out)
    fixed = (
        streams * block
        + 4 * matrices * widest.columns**2
        + 12 * largest
        + streams * tokens * hidden * itemsize
        + batch * min(inside, 12 * widest.columns * itemsize)
    )
    paused = streams * tokens * (hidden + widest.columns) * itemsize
    peak = max(fixed + paused, 2 * outside)
    keep = peak <= 0.8 * budget
    if not keep:
        peak = fixed
    peak = max(peak, measuring)
    return _checked(replace(plan, peak_bytes=int(peak) + 200_000_000, keep_paused=keep), budget)


def _measuring_bytes(plan: Plan, block: int, outside: int) -> int:
    """What measuring sensitivities holds: a stream per block; a block, rounded too; then embedding, head and logits."""
    if plan.budget is None:
        return 0
    tokens = plan.measured_rows * plan.options.calibration.seq_len
    hidden = plan.skeleton.config.get_text_config().hidden_size
    streams = (len(plan.layout.blocks) + 3) * tokens * hidden * plan.dtype.itemsize
    vocabulary = plan.skeleton.get_submodule(plan.layout.embedding).weight.shape[0]
    widest = max(t.columns for t in plan.targets.values())
    largest = max(t.rows * t.columns for t in plan.targets.values())
    float_size = plan.dtype.itemsize
    inside = 2 * block + 16 * largest + 8 * tokens * (widest + 4 * hidden)
    logits = 3 * outside * float_size // 2 + 12 * plan.options.calibration.seq_len * vocabulary
    return int(streams + max(inside, logits))


def _checked(plan: Plan, budget: int) -> Plan:
    if plan.training is not None:  # which comes first and fits, or it would have been refused
        plan = replace(plan, peak_bytes=max(plan.peak_bytes, plan.training.peak_bytes))
    if plan.peak_bytes > budget:
        raise ResourceError(
            f"the run needs about {plan.peak_bytes / 1e9:.2f} GB of memory, {budget / 1e9:.2f} GB are free",
            hint="lower --num-samples or --seq-len, or use --preset fast",
        )
    require_free_bytes(Path(plan.options.output).absolute().parent, int(1.1 * plan.size_bytes))
    return plan
