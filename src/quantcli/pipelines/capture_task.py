"""`quantcli capture-onnx-graph` of what is no decoder-only language model: encoders, classifiers, encoder-decoders."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantcli.errors import UsageError
from quantcli.export import encoder_decoder, whole_model
from quantcli.folder import (
    Manifest,
    create_output,
    describe_parent,
    fingerprint,
    folder_size_bytes,
    public_options,
    require_free_bytes,
)
from quantcli.graphs.weights.accuracy_level import count_by_bits
from quantcli.models.checkpoint import Checkpoint, copy_companions
from quantcli.models.tasks import TRANSLATION, load_for_task
from quantcli.options import CaptureOptions
from quantcli.progress import Progress

__all__ = ["TaskCaptureResult", "run"]


@dataclass(frozen=True)
class TaskCaptureResult:
    """What `run` wrote and measured."""

    output: Path
    """The folder."""
    task: str
    """What the graphs answer."""
    size_bytes: int
    """Bytes of its model."""
    nodes: dict[str, dict[str, int]]
    """Products with a float weight, by graph."""
    errors: dict[str, float]
    """Relative error of the outputs beside the checkpoint's own, by graph."""
    seconds: float
    """How long it took."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self) | {"output": str(self.output)}


def run(options: CaptureOptions, folder: Path, task: str, progress: Progress) -> TaskCaptureResult:
    """Captures the graphs.

    Args:
        options: As they were given.
        folder: The checkpoint.
        task: What it is captured for.
        progress: Told what happens.

    Raises:
        UsageError: options that apply to language models alone.
        InputError: the model cannot be read, exported or run.
    """
    begin = time.perf_counter()
    _refuse_options(options, task)
    size = Checkpoint.open(folder).size_bytes
    progress.plan("Capture", [("model", options.model), ("task", task), ("exporter", "torch"),
                              ("output", str(options.output))])  # fmt: skip
    require_free_bytes(options.output.absolute().parent, size)
    model = load_for_task(folder, options.task, options.trust_remote_code)
    resolved = asdict(options) | {"output": str(options.output), "task": task, "exporter": "torch"}
    with create_output(options.output, plan=resolved, inputs=[folder], force=options.force) as partial:
        errors: dict[str, float] = {}
        if task in TRANSLATION:
            errors |= encoder_decoder.write_pair(model, folder, partial.model, options.target_opset)
        else:
            graphs = whole_model.graphs_of(model, folder, task)
            for graph, error in whole_model.write(model, graphs, partial.model, options.target_opset):
                errors[graph.name] = error
        copy_companions(folder, partial.model)
        model.config.save_pretrained(partial.model)
        result = TaskCaptureResult(
            output=options.output,
            task=task,
            size_bytes=folder_size_bytes(partial.model),
            nodes={name: count_by_bits(partial.model / f"{name}.onnx") for name in errors},
            errors=errors,
            seconds=round(time.perf_counter() - begin, 2),
        )
        metrics = {k: v for k, v in result.to_dict().items() if k != "output"}
        parent = describe_parent(folder, fingerprint(folder))
        partial.commit(Manifest("onnx", "capture-onnx-graph", public_options(resolved), parent, metrics))
    return result


def _refuse_options(options: CaptureOptions, task: str) -> None:
    if options.exporter == "genai":
        raise UsageError(
            f"--exporter genai is for text-generation; this model is captured for {task}",
            hint="leave --exporter genai out",
        )
    for flag in ("accuracy_level", "lm_head_bits", "block_size", "precision"):
        value = getattr(options, flag)
        if value is not None and not (flag == "precision" and value == "fp32"):
            raise UsageError(
                f"--{flag.replace('_', '-')} is for text-generation; this model is captured for {task}, in float",
                hint="leave it out, and quantize the graph: quantcli quantize -m GRAPH -a dynamic, static or rtn",
            )
