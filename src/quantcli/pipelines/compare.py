"""`quantcli compare`: the same job by our own code and by backends, scored alike, in one table."""

import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantcli.algorithms import find_chain
from quantcli.backends import BACKENDS, find_backend
from quantcli.errors import InterruptedRunError, QuantcliError, UsageError, nearest
from quantcli.options import CalibrationOptions, CompareOptions, EvaluateOptions, QuantizeOptions
from quantcli.pipelines import evaluate, inspect, quantize
from quantcli.pipelines.external.plan import plan_external
from quantcli.pipelines.graph.source import is_graph
from quantcli.progress import Progress, Silent

__all__ = ["Comparison", "Entrant", "run"]

_OURS = "ours"


@dataclass(frozen=True)
class Entrant:
    """One of those compared, and what became of it."""

    name: str
    """As it was named."""
    algorithm: str
    """The method that ran."""
    scheme: str = ""
    """Bits, group size and grid that it stored, in words."""
    kl: float | None = None
    """Mean KL(original || result) in nats per token."""
    kl_error: float | None = None
    """Its standard error."""
    perplexity: float | None = None
    size_bytes: int | None = None
    bits_per_weight: float | None = None
    seconds: float | None = None
    """Of the whole run, reading and verifying included."""
    peak_bytes: int | None = None
    """Most memory: of the backend's processes; of ours, what the run added to the process."""
    opens: tuple[str, ...] = ()
    """Programs that open the result, by the table of readers."""
    failure: str = ""
    """Why there is no result."""


@dataclass(frozen=True)
class Comparison:
    """All of them."""

    model: str
    text: str
    """Where the text that scored came from."""
    reference_perplexity: float | None
    reference_size_bytes: int | None
    entrants: list[Entrant]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def run(options: CompareOptions, progress: Progress | None = None) -> Comparison:
    """Quantizes by each and scores the results.

    A backend that fails has its reason in its row, the others go on.

    Raises:
        UsageError: an entrant is unknown, not installed, or cannot do the job; before the first run.
        InputError: the model cannot be read.
    """
    progress = progress or Silent()
    if is_graph(options.model):
        raise UsageError(
            f"{options.model} is an ONNX graph, checkpoints are compared",
            hint="quantize it by each --backend; `quantcli evaluate` compares a graph with its original",
        )
    with ExitStack() as stack:
        root = options.output or Path(stack.enter_context(TemporaryDirectory(prefix="quantcli-compare-")))
        jobs = [_job(options, word, root) for word in options.entrants]
        logits = stack.enter_context(TemporaryDirectory(prefix="quantcli-logits-"))
        entrants, scores = [], None
        for word, job in zip(options.entrants, jobs, strict=True):
            progress.note(f"--- {word}")
            entrant, found = _enter(options, word, job, Path(logits), progress)
            entrants.append(entrant)
            scores = found or scores
    return Comparison(
        options.model,
        scores.text if scores is not None else "",
        scores.reference_perplexity if scores is not None else None,
        scores.reference_size_bytes if scores is not None else None,
        entrants,
    )


def _job(options: CompareOptions, word: str, root: Path) -> QuantizeOptions:
    """What an entrant is asked to do, refused here where it cannot."""
    name, _, method = word.partition(":")
    if name != _OURS and name not in BACKENDS:
        raise UsageError(
            f"unknown entrant {name!r}, {nearest(name, [_OURS, *BACKENDS])}", hint="see `quantcli backends`"
        )
    chosen = method.replace("+", ",") or options.algorithm
    job = QuantizeOptions(
        options.model,
        root / re.sub(r"[^\w.-]", "-", word),
        algorithm=chosen,
        backend=None if name == _OURS else name,
        timeout=None if name == _OURS else options.timeout,
        bits=options.bits,
        group_size=options.group_size,
        symmetric=options.symmetric,
        calibration=options.calibration,
        max_memory=options.max_memory,
        trust_remote_code=options.trust_remote_code,
        force=options.force,
    )
    job = _fitted(job)
    if name == _OURS:
        quantize.run(replace(job, dry_run=True))
    else:
        plan_external(job)
    return job


def _fitted(job: QuantizeOptions) -> QuantizeOptions:
    """Without what the method has no choice in: a grid, groups, text."""
    if job.backend is None:
        reads = job.algorithm is None or any(a.calibration != "none" for a in find_chain(job.algorithm))
        return job if reads else replace(job, calibration=CalibrationOptions())
    _, method = find_backend(job.backend).find_method(job.algorithm)
    return replace(
        job,
        group_size=job.group_size if method.group_size is not None else None,
        symmetric=job.symmetric if method.symmetric is not None and job.symmetric in method.grids else None,
        calibration=job.calibration if method.calibrates else CalibrationOptions(),
    )


def _enter(
    options: CompareOptions, word: str, job: QuantizeOptions, logits: Path, progress: Progress
) -> tuple[Entrant, Any]:
    """Runs a job and scores what it wrote."""
    named = job.algorithm or ("gptq" if job.backend is None else next(iter(find_backend(job.backend).methods)))
    try:
        made: Any = quantize.run(job, progress)
        scores = evaluate.run(
            EvaluateOptions(
                str(job.output),
                options.model,
                data=options.eval_data,
                num_samples=options.eval_samples,
                seq_len=options.calibration.seq_len,
                reference_cache=logits,
                speed=False,
                trust_remote_code=options.trust_remote_code,
            ),
            progress,
        )
        found = inspect.run(job.output)
    except InterruptedRunError:
        raise
    except QuantcliError as error:
        progress.warn(f"{word}: {error.message}")
        return Entrant(word, named, failure=error.message), None
    entrant = Entrant(
        word,
        str(made.plan.get("algorithm", named)),
        _scheme(made.plan),
        scores.kl_mean,
        scores.kl_standard_error,
        scores.perplexity,
        scores.size_bytes,
        scores.bits_per_weight,
        round(made.seconds, 1),
        made.peak_bytes,
        tuple(reader for reader, why in found.opens.items() if why is None),
    )
    return entrant, scores


def _scheme(plan: dict[str, Any]) -> str:
    inner = plan.get("scheme", plan)
    return f"{inner['bits']} bits, {inner['group_size']}, {'sym' if inner['symmetric'] else 'asym'}"
