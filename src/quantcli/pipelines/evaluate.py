"""`quantcli evaluate`: how good a model is, how far from its reference, how large and how fast."""

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError, UsageError
from quantcli.evaluate.divergence import Scores, score_window
from quantcli.evaluate.kept_logits import KeptLogits, Scorer
from quantcli.evaluate.language_model import LanguageModel, open_language_model
from quantcli.evaluate.memory import peak_memory
from quantcli.evaluate.result import EvaluationResult
from quantcli.evaluate.speed import measure_speed
from quantcli.evaluate.text import open_tokenizer, read_windows, require_same_tokens
from quantcli.folder import fingerprint, read_manifest
from quantcli.models.checkpoint import read_config
from quantcli.models.online import OnlineRotations
from quantcli.models.source import locate_model
from quantcli.options import FLOAT_BITS, EvaluateOptions, GraphEvaluationOptions, SimulationOptions
from quantcli.pipelines.inspect import weight_records, weight_size_bytes
from quantcli.progress import Progress, Silent
from quantcli.tensors.inventory import quantized_bits_per_weight, total_bits_per_weight

__all__ = ["run"]


def run(
    options: EvaluateOptions, progress: Progress | None = None, enough: Callable[[Scores], bool] | None = None
) -> EvaluationResult:
    """Evaluates a folder; gates that fail are in the result's `failures`, the caller decides what they mean.

    The model is opened and timed alone, so that its speed and memory are its own; then it scores text side by side
    with the reference, window by window.

    Args:
        options: What to evaluate, and on what.
        progress: Told what happens.
        enough: Asked after each window whether what is known suffices; the result then tells of these windows alone.

    Raises:
        InputError: a folder that cannot be read or run, texts too short, models that do not share a vocabulary.
        UsageError: windows longer than a model takes.
    """
    progress = progress or Silent()
    _refuse_graph_options(options)
    model_folder = locate_model(options.model)
    reference_folder = None if options.reference is None else locate_model(options.reference)
    simulation, timed = options.simulation, options.speed
    if simulation.simulates:
        progress.note(f"simulating {simulation.describe()}")
        if timed:
            progress.note("speed is not measured: the simulation takes the time that such a model would save")
        timed = False
    else:
        _note_what_it_was_made_for(model_folder, progress)
    windows, text = _windows(options, model_folder, reference_folder)
    records = weight_records(model_folder)

    speed = memory = None
    reference: Scorer | None = None
    with peak_memory() as watched:
        model = open_language_model(model_folder, options.device, options.trust_remote_code, simulation)
        try:
            _check_length(model, model_folder, options)
            if timed:
                progress.note("measuring speed")
                speed = measure_speed(model, windows[0])
        except BaseException:
            model.close()
            raise
    if timed:
        memory = watched.above_start_bytes
    try:
        if reference_folder is not None:
            reference = _open_reference(reference_folder, options)
        scores = _score(model, reference, windows, progress, enough)
    finally:
        model.close()
        if reference is not None:
            reference.close()

    figures: dict[str, Any] = {}
    if reference_folder is not None:
        figures |= {
            "reference_perplexity": scores.reference_perplexity,
            "reference_size_bytes": weight_size_bytes(reference_folder),
            "kl_mean": scores.kl_mean,
            "kl_standard_error": scores.kl_standard_error,
            "kl_99th_percentile": scores.kl_99th_percentile,
            "top1_agreement": scores.top1_agreement,
        }
    if speed is not None:
        figures |= {
            "prefill_tokens_per_second": speed.prefill_tokens_per_second,
            "decode_tokens_per_second": speed.decode_tokens_per_second,
            "peak_memory_bytes": memory,
        }
    result = EvaluationResult(
        model=str(options.model),
        reference=options.reference,
        text=text,
        windows=len(scores.loss),
        tokens=len(scores.loss) * (windows.shape[1] - 1),
        perplexity=scores.perplexity,
        size_bytes=weight_size_bytes(model_folder),
        quantized_bits_per_weight=quantized_bits_per_weight(records),
        bits_per_weight=total_bits_per_weight(records),
        simulated=_simulated(simulation, model_folder),
        **figures,
    )
    result.failures.extend(_failed_gates(options, result))
    return result


def _refuse_graph_options(options: EvaluateOptions) -> None:
    """Refuses what only other graphs have.

    Raises:
        UsageError: naming the flag.
    """
    given, default = options.pair, GraphEvaluationOptions()
    odd = [f.name for f in fields(given) if getattr(given, f.name) != getattr(default, f.name)]
    if odd:
        raise UsageError(
            f"--{odd[0].replace('_', '-')} is for ONNX graphs that are no language models, {options.model} is one",
            hint="leave it out; --max-kl and --max-perplexity-increase are gates for language models",
        )


def _note_what_it_was_made_for(folder: Path, progress: Progress) -> None:
    """Says which numbers a folder was made for that its weights do not show."""
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        progress.warn(f"{error.message}; how the folder was made is not known")
        return
    made = manifest.options.get("simulation") if manifest is not None and manifest.command == "quantize" else None
    if not isinstance(made, dict):
        return
    flags = [f"--{n}-bits {made[f'{n}_bits']}" for n in "akv" if made.get(f"{n}_bits", FLOAT_BITS) != FLOAT_BITS]
    if flags:
        progress.note(f"weights alone are scored; it was made for activations or cache of few bits: {' '.join(flags)}")


def _simulated(simulation: SimulationOptions, folder: Path) -> dict[str, Any] | None:
    if not simulation.simulates:
        return None
    online = OnlineRotations.of(read_config(folder))
    rotations = None if online is None else asdict(online)
    return simulation.resolved() | {"online_rotations": rotations, "description": simulation.describe()}


def _windows(options: EvaluateOptions, model: Path, reference: Path | None) -> tuple[Tensor, str]:
    """The text as tokens [W, T] int64, the same for both models, and where it came from."""
    if options.seq_len < 2:
        raise UsageError(f"--seq-len must be 2 or more to score anything, got {options.seq_len}")
    tokenizer = open_tokenizer(model, options.trust_remote_code)
    windows, texts, source = read_windows(
        tokenizer, options.data, options.text_field, options.num_samples, options.seq_len
    )
    if reference is not None:
        other = open_tokenizer(reference, options.trust_remote_code)
        require_same_tokens(tokenizer, other, texts, model, reference)
    return windows, source


def _check_length(model: LanguageModel, folder: Path, options: EvaluateOptions) -> None:
    if model.max_positions is not None and options.seq_len > model.max_positions:
        raise UsageError(
            f"--seq-len {options.seq_len} is more than the {model.max_positions} positions of {folder}",
            hint=f"add --seq-len {model.max_positions}",
        )


def _open_reference(folder: Path, options: EvaluateOptions) -> Scorer:
    def open_model() -> LanguageModel:
        reference = open_language_model(folder, options.device, options.trust_remote_code)
        _check_length(reference, folder, options)
        reference.keep_float_weights()
        return reference

    if options.reference_cache is None:
        return open_model()
    return KeptLogits(options.reference_cache, fingerprint(folder), open_model)


def _score(
    model: LanguageModel,
    reference: Scorer | None,
    windows: Tensor,
    progress: Progress,
    enough: Callable[[Scores], bool] | None,
) -> Scores:
    scores = Scores()
    model.keep_float_weights()
    with progress.track("scoring", len(windows)) as task, torch.inference_mode():
        for window in windows:
            ours = model.logits(window)
            theirs = None if reference is None else reference.logits(window)
            score_window(scores, window, ours, theirs)
            task.advance(1, f"perplexity {scores.perplexity:.2f}")
            if enough is not None and enough(scores):
                break
    return scores


def _failed_gates(options: EvaluateOptions, result: EvaluationResult) -> list[str]:
    failures = []
    if options.max_kl is not None:
        if result.kl_mean is None:
            raise InputError("there is no KL to hold against --max-kl")
        if not result.kl_mean <= options.max_kl:
            failures.append(f"KL {result.kl_mean:.4f} is above --max-kl {options.max_kl:g}")
    limit, increase = options.max_perplexity_increase, result.perplexity_increase
    if limit is not None and increase is not None and not increase <= limit:
        failures.append(f"perplexity grew by {increase:.1%}, more than --max-perplexity-increase {limit:g} allows")
    return failures
