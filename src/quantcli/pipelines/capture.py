"""`quantcli capture-onnx-graph`: a checkpoint becomes a folder that ONNX Runtime GenAI runs, verified bit for bit."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError, UsageError, nearest
from quantcli.export import builder, torch_exporter
from quantcli.export.accuracy import (
    COMPARED_TOKENS,
    LARGEST_FLIP_RATE,
    LevelCheck,
    Probe,
    compare_levels,
    probe,
    refuse_other_function,
)
from quantcli.export.companions import context_length, copy_tokenizer, probe_tokens, read_tokenizer
from quantcli.export.matrices import Matrices, find_matrices, load_matrices
from quantcli.folder import (
    Manifest,
    create_output,
    describe_parent,
    fingerprint,
    folder_size_bytes,
    public_options,
    require_free_bytes,
)
from quantcli.formats.gptq import LOWEST_ZERO
from quantcli.graphs.checking.read_back import verify_weights
from quantcli.graphs.model.files import check_external_data
from quantcli.graphs.weights.accuracy_level import change_accuracy_level, count_by_bits
from quantcli.models.online import refuse_online
from quantcli.models.opened import open_checkpoint
from quantcli.models.readers import not_in_graphs
from quantcli.models.source import locate_model
from quantcli.models.tasks import GENERATION, SEEING, TASKS, find_task, load_for_task
from quantcli.options import CaptureOptions
from quantcli.pipelines import capture_task
from quantcli.pipelines.capture_task import TaskCaptureResult
from quantcli.progress import Progress, Silent
from quantcli.scheme import Scheme

__all__ = ["CaptureResult", "run"]

EXPORTERS = ("auto", "genai", "torch")
PRECISIONS = ("fp32", "fp16", "int4", "int8")
HEAD_BITS = (4, 8, 16)
BLOCK_SIZES = (16, 32, 64, 128, 256)
_DEFAULT_BLOCK = 32


@dataclass(frozen=True)
class CaptureResult:
    """What `run` wrote and measured."""

    output: Path
    """The folder."""
    size_bytes: int
    """Bytes of its model."""
    nodes: dict[str, int]
    """Quantized nodes by bits, and products with a float weight."""
    accuracy_level: int | None
    """Of MatMulNBits; None where there is none."""
    flip_rate: float | None
    """Share of top tokens that accuracy level 4 changes, measured; None where there is nothing to measure."""
    tokens_per_second: float | None
    """Decoding, batch of one, while it was checked; None where the graph cannot run here."""
    sample: str | None
    """What it wrote after a short prompt; None where the graph cannot run here."""
    seconds: float
    """How long it took."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self) | {"output": str(self.output)}


def run(options: CaptureOptions, progress: Progress | None = None) -> CaptureResult | TaskCaptureResult:
    """Captures the graph.

    Raises:
        UsageError: options that exclude each other or do not apply to this model.
        InputError: the model cannot be read, exported or run.
        ResourceError: not enough disk.
    """
    progress, begin = progress or Silent(), time.perf_counter()
    _check_options(options)
    folder = locate_model(options.model)
    checkpoint = open_checkpoint(folder)
    task = _plain(options.task) or find_task(checkpoint.config)
    if task not in (GENERATION, SEEING):
        return capture_task.run(options, folder, task, progress)
    refuse_online(checkpoint.config, folder, "which no graph of ours computes")
    is_quantized = checkpoint.config.get("quantization_config") is not None
    if (why := not_in_graphs(checkpoint)) is not None:
        raise InputError(
            f"{folder} has no exact form in MatMulNBits, which has evenly spaced levels and float activations: {why}",
            hint="quantize the original with -a gptq or kquant, or with --format float for a float graph",
        )
    _check_input(options, is_quantized)
    if options.target_opset is not None and options.exporter != "torch":
        raise UsageError(
            "--target-opset applies to --exporter torch; the GenAI builder fixes its own opset",
            hint="add --exporter torch, or leave --target-opset out",
        )
    tokenizer = read_tokenizer(folder, options.trust_remote_code)
    if task == SEEING:
        _check_language_part(options)
        progress.warn("the language model is captured, without the tower that sees: the graph takes text alone")
    exporters = _choose_exporters(options, folder, progress) if task == GENERATION else ("torch",)
    resolved = asdict(options) | {"output": str(options.output), "precision": options.precision or "fp32"}
    progress.plan(
        "Capture",
        [
            ("model", f"{options.model} ({'quantized' if is_quantized else 'float'})"),
            ("exporter", ", else ".join(exporters)),
            ("precision", "as quantized" if is_quantized else resolved["precision"]),
            ("output", str(options.output)),
        ],
    )
    require_free_bytes(options.output.absolute().parent, checkpoint.size_bytes)
    with create_output(options.output, plan=resolved, inputs=[folder], force=options.force) as partial:
        if options.precision == "fp16":
            checkpoint.require_finite()
            builder.build_half_precision(folder, partial.model, options.trust_remote_code)
            check_external_data(partial.model / builder.GRAPH)
            progress.warn("float16 graphs need CUDA: this one was written but not opened, nothing here can run it")
            level, check, last = None, None, None
        else:
            text, prompt = probe_tokens(tokenizer)
            exporter, exact = _write_graph(options, task, exporters, folder, partial.model, text, prompt, progress)
            resolved["exporter"] = exporter
            level, check, last = _choose_level(options, partial.model, text, prompt, exact, progress)
        copy_tokenizer(folder, partial.model)
        sample = tokenizer.decode(last.sample) if last is not None else None
        result = CaptureResult(
            output=options.output,
            size_bytes=folder_size_bytes(partial.model),
            nodes=count_by_bits(partial.model / builder.GRAPH),
            accuracy_level=level,
            flip_rate=check.flip_rate if check is not None else None,
            tokens_per_second=round(last.tokens_per_second, 2) if last is not None else None,
            sample=sample,
            seconds=round(time.perf_counter() - begin, 2),
        )
        metrics = {k: v for k, v in result.to_dict().items() if k != "output"}
        if check is not None:
            metrics["accuracy_check"] = asdict(check)
        made = public_options(resolved | {"accuracy_level": level})
        parent = describe_parent(folder, fingerprint(folder))
        partial.commit(Manifest("onnx", "capture-onnx-graph", made, parent, metrics))
    return result


def _check_options(options: CaptureOptions) -> None:
    """Refuses values that cannot be, before anything is read."""
    for flag, value, allowed in (
        ("exporter", options.exporter, EXPORTERS),
        ("precision", options.precision, (None, *PRECISIONS)),
        ("task", _plain(options.task), (None, *TASKS)),
    ):
        if value not in allowed:
            known = [a for a in allowed if a is not None]
            raise UsageError(f"unknown --{flag} {value!r}, {nearest(str(value), known)}")
    if options.accuracy_level is not None and options.accuracy_level not in range(5):
        raise UsageError(f"--accuracy-level must be 0 to 4, got {options.accuracy_level}")
    if options.block_size is not None and options.block_size not in BLOCK_SIZES:
        raise UsageError(f"--block-size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {options.block_size}")
    if options.lm_head_bits is not None and options.lm_head_bits not in HEAD_BITS:
        raise UsageError(f"--lm-head-bits must be 4, 8 or 16 (float), got {options.lm_head_bits}")
    low, high = torch_exporter.OPSETS
    if options.target_opset is not None and not low <= options.target_opset <= high:
        raise UsageError(f"--target-opset must be {low} to {high}, got {options.target_opset}")
    if options.precision == "fp16":
        if options.exporter == "torch":
            raise UsageError("--precision fp16 applies to --exporter genai", hint="leave --exporter torch out")
        for flag in ("accuracy_level", "lm_head_bits", "block_size"):
            if getattr(options, flag) is not None:
                raise UsageError(f"--{flag.replace('_', '-')} does not apply to --precision fp16, which has no codes")


def _check_language_part(options: CaptureOptions) -> None:
    """Refuses what the language part of a larger model does not take."""
    if options.exporter == "genai" or options.precision not in (None, "fp32") or options.lm_head_bits in (4, 8):
        raise UsageError(
            f"a model of images and text ({SEEING}) is captured by torch.onnx in float32",
            hint="leave --exporter genai, --precision and --lm-head-bits out, and quantize the graph afterwards",
        )


def _plain(task: str | None) -> str | None:
    """The task without a suffix that others have for graphs with a cache, as ours always are."""
    return task.removesuffix("-with-past") if task is not None else None


def _check_input(options: CaptureOptions, is_quantized: bool) -> None:
    """Refuses options that do not apply to this model."""
    rounds = options.precision in ("int4", "int8")
    if is_quantized and options.precision not in (None, "fp32"):
        raise UsageError(
            f"--precision {options.precision} applies to float input; this checkpoint is quantized and keeps its codes",
            hint="leave --precision out, or give the float model",
        )
    makes_head = options.lm_head_bits in (4, 8)
    if options.block_size is not None and not (rounds or makes_head):
        raise UsageError(
            "--block-size applies where capture quantizes: --precision int4 or int8 on float input, or --lm-head-bits",
            hint="leave --block-size out",
        )
    if options.accuracy_level is not None and not (is_quantized or rounds or makes_head):
        raise UsageError(
            "--accuracy-level applies to quantized products; this graph would have none",
            hint="leave --accuracy-level out, or add --precision int4",
        )


def _choose_exporters(options: CaptureOptions, folder: Path, progress: Progress) -> tuple[str, ...]:
    """The exporters to try, in order; the builder is asked with a small model of the same configuration first."""
    if options.exporter != "auto":
        return (options.exporter,)
    if options.precision == "fp16":
        return ("genai",)
    try:
        builder.try_architecture(folder, options.trust_remote_code)
    except InputError as error:
        progress.note(f"{error.message}: torch.onnx exports it")
        return ("torch",)
    return ("genai", "torch")


def _write_graph(
    options: CaptureOptions,
    task: str,
    exporters: tuple[str, ...],
    folder: Path,
    target: Path,
    text: list[int],
    prompt: list[int],
    progress: Progress,
) -> tuple[str, Probe]:
    """Writes model.onnx at accuracy level 0 by the first exporter whose graph computes what the checkpoint does.

    Returns:
        The exporter, and what the graph did.
    """
    for exporter in exporters:
        if task == SEEING:
            model = load_for_task(folder, options.task, options.trust_remote_code)
            matrices = find_matrices(model, folder)
        else:
            model, matrices = load_matrices(folder, options.trust_remote_code)
        model_type = str(model.config.model_type)
        _round_what_was_asked(options, model, matrices)
        tokens = matrices.shape(matrices.embedding)[0]
        if max(text) >= tokens:
            raise InputError(f"{folder}: the tokenizer gives token {max(text)}, the model knows {tokens}")
        with torch.no_grad():
            wanted: Tensor = model(torch.tensor([text[:COMPARED_TOKENS]])).logits[0].clone()
        try:
            if exporter == "torch":
                placements = torch_exporter.export(folder, target, model, matrices, options.target_opset)
            else:
                placements = builder.build(folder, target, model, matrices, 0, options.trust_remote_code)
            del model
            progress.note("comparing every weight of the graph with the checkpoint")
            expected = matrices.quantized | {r.name: matrices.shape(r.name)[0] for p in placements for r in p.ranges}
            verify_weights(target / builder.GRAPH, placements, matrices, expected)
            exact = probe(target, text, prompt, context_length(target))
            kind = str(wanted.dtype).removeprefix("torch.")
            refuse_other_function(exact.first, wanted.float().numpy(), kind, model_type, exporter)
        except InputError as error:
            if exporter == exporters[-1]:
                raise
            progress.note(f"{error.message}: torch.onnx exports it")
            for path in target.iterdir():
                path.unlink()
        else:
            return exporter, exact
    raise AssertionError("no exporter was tried")


def _round_what_was_asked(options: CaptureOptions, model: Any, matrices: Matrices) -> None:
    block = options.block_size or _DEFAULT_BLOCK
    if options.precision in ("int4", "int8"):
        stacked = [n for n, p in model.named_parameters() if p.ndim == 3 and "expert" in n]
        if stacked:
            raise UsageError(
                f"--precision {options.precision} rounds linears; {stacked[0]} holds all experts' matrices in one",
                hint="quantize the checkpoint first: quantcli quantize -m MODEL -a rtn -o Q, then capture Q",
            )
        matrices.round_linears(model, Scheme(4 if options.precision == "int4" else 8, block, lowest_zero=LOWEST_ZERO))
    wanted = options.lm_head_bits
    if wanted is None:
        return
    stored = matrices.stored_bits(matrices.head)
    if stored is not None and stored != wanted:
        raise UsageError(
            f"--lm-head-bits {wanted}: the checkpoint's output head has {stored} bits and keeps its codes",
            hint="leave --lm-head-bits out, or quantize again with another --override for the head",
        )
    if stored is None and wanted != 16:
        matrices.round_head(model, Scheme(wanted, block, lowest_zero=LOWEST_ZERO))


def _choose_level(
    options: CaptureOptions, model: Path, text: list[int], prompt: list[int], exact: Probe, progress: Progress
) -> tuple[int | None, LevelCheck | None, Probe]:
    """Settles the accuracy level by what level 4 does to the top tokens; `exact` ran at level 0."""
    path, longest = model / builder.GRAPH, context_length(model)
    asked = options.accuracy_level
    if change_accuracy_level(path, 4 if asked is None else asked) == 0:
        return None, None, exact
    if asked in (0, 1, 2, 3):
        return asked, None, probe(model, text, prompt, longest) if asked else exact
    int8 = probe(model, text, prompt, longest)
    check = compare_levels(exact, int8)
    said = (
        f"accuracy level 4 (int8 arithmetic) changes {check.flip_rate:.1%} of {check.positions} top tokens, "
        f"{check.int8_tokens_per_second:.1f} tokens/s against {check.exact_tokens_per_second:.1f} at level 0"
    )
    if asked == 4:
        (progress.warn if check.flip_rate > LARGEST_FLIP_RATE else progress.note)(said)
        return 4, check, int8
    if check.worth_it:
        progress.note(f"{said}: taken")
        return 4, check, int8
    change_accuracy_level(path, 0)
    if check.flip_rate > LARGEST_FLIP_RATE:
        progress.warn(f"{said}: level 0 is taken; --accuracy-level 4 takes the other")
    else:
        progress.note(f"{said}: level 0 is taken")
    return 0, check, exact
