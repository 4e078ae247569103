"""What every quantizer of graphs writes: the graph opened once more, its companions, report and manifest."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantcli.errors import InputError
from quantcli.folder import (
    Manifest,
    PartialFolder,
    create_output,
    folder_size_bytes,
    package_versions,
    public_options,
    require_free_bytes,
    write_json,
)
from quantcli.graphs.checking.side_by_side import SideBySide
from quantcli.options import QuantizeOptions
from quantcli.pipelines.graph.source import GraphSource
from quantcli.progress import Progress
from quantcli.report.layer import LayerReport

__all__ = ["GraphResult", "commit_graph", "not_smaller", "open_graph_output"]


_SMALL_BYTES = 1_000_000
"""Of a graph below this, nodes and scales may take more than codes save."""


@dataclass(frozen=True)
class GraphResult:
    """What `quantize` wrote and measured where the model is a graph."""

    output: Path
    """The folder."""
    layers: list[LayerReport]
    """A report on each matrix; none where a quantizer of whole graphs measures none."""
    kept: dict[str, str]
    """Why weights stayed float, by initializer or node."""
    size_bytes: int
    """Of the graph and its weights."""
    parent_size_bytes: int
    """The same of the input."""
    seconds: float
    """How long it took."""
    peak_bytes: int
    """Memory above what the process held when the run began."""
    plan: dict[str, Any]
    """What was decided beforehand."""
    conversion: dict[str, Any] | None = None
    """To a later opset: before, after, and by how much the outputs differ."""
    bits_per_weight: float | None = None
    """Stored bits of the quantized matrices: containers, scales and zero points."""
    information_bits_per_weight: float | None = None
    """The same with codes counted as what they can be: 3 bits that lie in 4-bit containers count 3."""
    outputs: SideBySide | None = None
    """How far off the outputs are, beside the float graph; None where they cannot be compared."""
    evaluation: Any = None
    """Of --evaluate."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json` and the report."""
        values = {k: v for k, v in self.__dict__.items() if k not in ("layers", "evaluation", "output", "outputs")}
        return {
            "output": str(self.output),
            **values,
            "layers": [asdict(layer) for layer in self.layers],
            "outputs": self.outputs.to_dict() if self.outputs is not None else None,
            "evaluation": self.evaluation.to_dict() if self.evaluation is not None else None,
        }


@contextmanager
def open_graph_output(source: GraphSource, options: QuantizeOptions, needed_bytes: int) -> Iterator[PartialFolder]:
    """The output folder while it is made; its `model` folder is there.

    Raises:
        UsageError: it cannot be written as asked.
        ResourceError: not enough disk.
        InterruptedRunError: Ctrl-C.
    """
    require_free_bytes(options.output.absolute().parent, needed_bytes)
    plan = asdict(options) | {"output": str(options.output), "parent": source.digest}
    inputs = [source.path if source.alone else source.folder]
    with create_output(options.output, plan=plan, inputs=inputs, force=options.force) as partial:
        partial.model.mkdir(parents=True, exist_ok=True)
        yield partial


def not_smaller(size_bytes: int, source: GraphSource, options: QuantizeOptions, *, integers: bool) -> str:
    """What to say of a result that takes as much as the graph, or more.

    Args:
        size_bytes: Of the result.
        source: The graph.
        options: Of the run.
        integers: Whether activations become integers too, which is not done for space alone.

    Raises:
        InputError: a smaller one was asked for.
    """
    said = f"the result is not smaller: it takes {size_bytes} bytes, the graph takes {source.size_bytes}"
    if options.graph.smaller_only or not (integers or source.size_bytes < _SMALL_BYTES):
        hint = "use fewer bits or larger groups"
        raise InputError(said, hint=hint + (", or leave out --smaller-only" if options.graph.smaller_only else ""))
    return said


def commit_graph(
    partial: PartialFolder,
    source: GraphSource,
    options: QuantizeOptions,
    result: GraphResult,
    progress: Progress,
    versions: Mapping[str, str] | None = None,
) -> GraphResult:
    """Puts the folder in its place, once the written graph was opened as its users will (`beside.Beside.run`).

    Args:
        partial: The folder; nothing but the graph and its data stand in its `model` folder.
        source: What it was made from.
        options: As resolved, algorithm named.
        result: What was measured; sizes are filled in.
        progress: Told of what is not copied.
        versions: Of packages that took part beside our own.

    Raises:
        InputError: it is not smaller and has to be.
    """
    size = folder_size_bytes(partial.model)
    if size >= source.size_bytes:
        progress.warn(not_smaller(size, source, options, integers=not result.layers))
    source.copy_companions(partial.model, progress)
    result = replace(result, size_bytes=size, parent_size_bytes=source.size_bytes)
    write_json(partial.root / "report.json", result.to_dict())
    errors = [layer.relative_error for layer in result.layers]
    metrics = {
        "seconds": round(result.seconds, 1),
        "peak_bytes": result.peak_bytes,
        "size_bytes": size,
        **({"bits_per_weight": round(result.bits_per_weight, 4)} if result.bits_per_weight is not None else {}),
        **({"mean_relative_error": sum(errors) / len(errors)} if errors else {}),
        **({"outputs": result.outputs.to_dict()} if result.outputs is not None else {}),
    }
    took_part = package_versions() | dict(versions or {})
    partial.commit(Manifest("onnx", "quantize", public_options(asdict(options)), source.describe(), metrics, took_part))
    return result
