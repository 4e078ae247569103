"""Plans a quantize run before it begins: every default resolved, whatever cannot work refused."""

from dataclasses import fields, replace

from quantcli.algorithms import Step
from quantcli.errors import UsageError
from quantcli.folder import fingerprint
from quantcli.models.experts import routed_only
from quantcli.models.layout import position_count, weight_shape
from quantcli.models.machine import compute_dtype, pick_device
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines.planning.estimate import with_budget, with_distilling, with_memory, with_source, with_training
from quantcli.pipelines.planning.gguf_types import resolve_gguf
from quantcli.pipelines.planning.layout import resolve_layout
from quantcli.pipelines.planning.opening import open_model
from quantcli.pipelines.planning.plan import Plan
from quantcli.pipelines.planning.share import count_share, require_share
from quantcli.pipelines.planning.sizes import written_bytes
from quantcli.pipelines.planning.steps import allowed_formats, resolve_bits, resolve_group_size, resolve_steps
from quantcli.pipelines.planning.storage import choose_storage
from quantcli.pipelines.planning.targets import find_embedding, find_scaled, refuse_unmatched

__all__ = ["make_plan"]


def make_plan(options: QuantizeOptions) -> Plan:
    """Resolves every default and refuses what cannot work, before anything is written.

    Raises:
        UsageError: options that contradict each other.
        InputError: a model that cannot be quantized.
        ResourceError: not enough memory or disk.
    """
    _refuse_graph_flags(options)
    if options.float_model is not None:
        raise UsageError(
            "--float-model is for -a distill of a folder that is quantized already; here the model itself is float",
            hint="leave it out",
        )
    options = resolve_gguf(resolve_layout(options))
    steps = resolve_steps(options)
    trainer = steps.pop() if steps[-1].algorithm.kind == "trainer" else None
    *transforms, rounder = steps
    rotation = next((step for step in transforms if step.algorithm.scope == "model"), None)
    allowed_formats(options.format, rounder.algorithm)
    model = open_model(options.model, rotation, trust_remote_code=options.trust_remote_code)
    columns = (weight_shape(model.skeleton.get_submodule(name))[1] for name in model.layout.linears)
    options = replace(
        options,
        bits=None if options.mixes else resolve_bits(options, rounder.algorithm),
        group_size=resolve_group_size(options, (*transforms, rounder), columns),
    )
    storage = choose_storage(options, model, rounder)
    options, targets = storage.options, storage.targets
    _refuse_format(options, trainer)
    scaling = next((step for step in transforms if step.algorithm.scope == "stage"), None)
    scaled = find_scaled(model) if scaling is not None and not targets else {}
    refuse_unmatched(getattr(scaling and scaling.settings, "patterns", ()), targets or scaled)
    embedding = find_embedding(options, model, storage.gguf)
    if options.calibration.moe_calibration != CalibrationOptions.moe_calibration and not model.skeleton.stacked:
        raise UsageError(f"{model.folder} has no experts, --moe-calibration would have no effect", hint="leave it out")
    if options.calibration.moe_calibration == "all" and (left := routed_only(model.skeleton)):
        raise UsageError(
            f"--moe-calibration all would have no effect on {left[0]}, whose experts are not called with their tokens",
            hint="leave it out; more --num-samples give each expert more tokens",
        )
    share = count_share(model.skeleton, model.layout, targets, embedding, options) if targets else None
    if share is not None:
        require_share(share, options, str(model.folder))
    device = pick_device(options.device)
    plan = Plan(
        folder=model.folder,
        transforms=tuple(transforms),
        algorithm=rounder.algorithm,
        settings=storage.settings,
        options=options,
        checkpoint=model.checkpoint,
        skeleton=model.skeleton,
        layout=model.layout,
        default=storage.default,
        targets=targets,
        opens=storage.opens,
        gguf=storage.gguf,
        scaled=scaled,
        embedding=embedding,
        untie_head=model.tied and (model.layout.head in targets or rotation is not None),
        source=None,
        device=device,
        dtype=compute_dtype(device, model.stored_dtype),
        keep_paused=True,
        size_bytes=0,
        peak_bytes=0,
        seconds=0.0,
        model_digest=fingerprint(model.folder),
        online=model.online,
        trainer=trainer,
        dequantized=model.dequantized,
        share=share,
    )
    plan = _within_positions(plan)
    plan = with_distilling(with_source(with_training(plan), model.config))
    plan = replace(plan, size_bytes=written_bytes(plan))
    if options.mixes:
        plan = with_budget(plan)
    return with_memory(plan)


def _refuse_format(options: QuantizeOptions, trainer: Step | None) -> None:
    """What is trained must lie beside the codes."""
    if trainer is not None and options.format not in trainer.algorithm.formats:
        raise UsageError(
            f"{trainer.algorithm.name} trains scales that stand beside codes, which format {options.format} has not",
            hint=f"use --format {' or '.join(trainer.algorithm.formats)}",
        )


def _within_positions(plan: Plan) -> Plan:
    """Rows no longer than a model that counts its positions has of them.

    Raises:
        UsageError: longer ones were asked for.
    """
    limit, calibration = position_count(plan.skeleton), plan.options.calibration
    if limit is None or calibration.seq_len <= limit or not plan.wants_text:
        return plan
    if calibration.seq_len != CalibrationOptions.seq_len:
        raise UsageError(
            f"--seq-len {calibration.seq_len} is longer than the {limit} positions of {plan.folder}",
            hint=f"use --seq-len {limit}",
        )
    return replace(plan, options=replace(plan.options, calibration=replace(calibration, seq_len=limit)))


def _refuse_graph_flags(options: QuantizeOptions) -> None:
    """No flag without effect."""
    for spec in fields(options.graph):
        if getattr(options.graph, spec.name) != spec.default:
            flag = "--" + ("no-" if spec.default is True else "") + spec.name.replace("_", "-")
            hint = "the output head stays float anyway" if spec.name == "quantize_last_matmul" else "leave it out"
            raise UsageError(f"{flag} is for ONNX graphs, {options.model} is a checkpoint", hint=hint)
