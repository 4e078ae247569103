"""Weight-only methods on an ONNX graph beside onnxruntime's own quantizer, as docs/onnx-quality.md.

    python benchmarks/onnx_quality.py [--only REGEX] [--samples 16] [--results FILE.json] [--output PAGE.md] [--tiny]

The demo model is captured as a float32 graph once. A cell is a method and a scheme: `quantcli quantize` on that graph,
or onnxruntime's MatMulNBitsQuantizer on the same graph with the same calibration inputs, then `quantcli evaluate`
against the float graph, each in a process of its own. It is kept in the results file as soon as it is measured, and
measured once: an interrupted benchmark continues where it was. `--only` is searched in names as "demo/gptq/8b g32".

`checkpoint, gptq` and the like quantize the checkpoint on the same text and capture the result: what that costs and is
worth.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept import cell_arguments, file_digest
from quality import FIGURES, Bench, environment
from quality_page import write_page
from running import ROOT, evaluate, quantcli, quantize_command, run_measured, take_demo, write_tiny_model

BEGIN_TEXT = "Written by `benchmarks/onnx_quality.py`; what stands between the two marks is replaced by each run."
LEGEND = """\
All methods start from one float32 graph and the same calibration inputs. KL is the mean divergence of the float graph's
distribution from the quantized graph's in nats per token, ± its standard error clustered by window; in brackets the
perplexity. Cost is the size of the graph with its weights (the embedding stays float), the processor seconds from start
to exit, and the peak memory above what the process held when it began. `ort` is onnxruntime's
MatMulNBitsQuantizer with the algorithm named; what it does not make is left empty, and its GPTQ sees 2 rows only: it
runs the whole graph for each matrix and row (100 minutes for 16). `best` is `--preset best`; awq is
followed by kquant where no rounder is named. `checkpoint, gptq` is the checkpoint quantized and then captured, its peak
that of quantizing. In an order, ≈ joins methods whose KL differs by less than the larger standard error."""


@dataclass(frozen=True)
class Scheme:
    """Bits, columns that share a scale, and the grid."""

    bits: int
    group_size: int
    symmetric: bool = False

    @property
    def flags(self) -> list[str]:
        """Of `quantcli quantize`."""
        symmetric = ["--sym"] if self.symmetric else []
        return ["--bits", str(self.bits), "--group-size", str(self.group_size), *symmetric]


SCHEMES: Mapping[str, Scheme] = {
    "4b g32 asym": Scheme(4, 32),
    "4b g32 sym": Scheme(4, 32, symmetric=True),
    "4b g128 asym": Scheme(4, 128),
    "8b g32": Scheme(8, 32),
    "2b g32": Scheme(2, 32),
}
OURS: Mapping[str, tuple[str, ...]] = {
    "rtn": ("-a", "rtn"),
    "hqq": ("-a", "hqq"),
    "hqq, float zeros": ("-a", "hqq", "--set", "zero=float"),
    "kquant": ("-a", "kquant"),
    "awq": ("-a", "awq"),
    "awq,gptq": ("-a", "awq,gptq"),
    "gptq": ("-a", "gptq"),
    "gptq, layer-wise": ("-a", "gptq", "--layer-wise"),
    "best": ("--preset", "best"),
}
CALIBRATED = ("awq", "awq,gptq", "gptq", "gptq, layer-wise", "best")
THEIRS: Mapping[str, tuple[int, ...]] = {
    "ort default": (2, 4, 8), "ort rtn": (4,), "ort kquant": (4,), "ort hqq": (2, 4), "ort gptq": (4,),
}  # fmt: skip
"""Each with the bits that it makes."""
ORT_GPTQ_ROWS = 2
"""onnxruntime's GPTQ runs the whole graph for each matrix and row: 100 minutes of one processor for 16 rows."""
CHECKPOINT: Mapping[str, tuple[str, ...]] = {
    "checkpoint, gptq": ("-a", "gptq"),
    "checkpoint, awq,gptq": ("-a", "awq,gptq"),
}
METHODS = (*OURS, *THEIRS, *CHECKPOINT)
FOR_COST = ("gptq, layer-wise", "checkpoint, awq,gptq")
"""Measured in the first scheme only: what they cost beside others."""


@dataclass(frozen=True)
class Cell:
    """What is measured at once."""

    method: str
    scheme: str

    @property
    def name(self) -> str:
        """Key in the results, and what `--only` is searched in."""
        return f"demo/{self.method}/{self.scheme}"


def cells() -> Iterator[Cell]:
    """All of them."""
    for method in METHODS:
        for name, scheme in SCHEMES.items():
            hqq_sym = "hqq" in method and scheme.symmetric
            made = (2, 4) if method == "hqq, float zeros" else THEIRS.get(method, (2, 4, 8))
            if scheme.bits in made and not hqq_sym and (method not in FOR_COST or name == next(iter(SCHEMES))):
                yield Cell(method, name)


@dataclass
class GraphBench(Bench):
    """The same book-keeping; graphs instead of checkpoints."""

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Quantizes and evaluates; what failed says so in its own words."""
        output, log = self.work / "quantized", self.work / "log"
        shutil.rmtree(output, ignore_errors=True)
        if cell.method in (*CALIBRATED, *CHECKPOINT):
            flags = {**OURS, **CHECKPOINT}[cell.method][:2]  # checkpoints have the same kernels, and no --layer-wise
            self.compile(" ".join(flags), [*flags, *SCHEMES[cell.scheme].flags], calibrates=True)
        command = self._command(cell, output)
        cost = run_measured(command, environment(), log)
        try:
            if cost.exit_code:
                return {"failed": f"exit {cost.exit_code}: {log.read_text(errors='replace').strip()[-300:]}"}
            report = json.loads((output / "report.json").read_text())
            folder, seconds = output / "model", cost.cpu_seconds
            if cell.method in CHECKPOINT:
                folder = self.work / "captured"
                shutil.rmtree(folder, ignore_errors=True)
                words = ["capture-onnx-graph", "-m", str(output), "-o", str(folder), "--accuracy-level", "0"]
                made = run_measured([sys.executable, "-m", "quantcli", *words], environment(), log)
                if made.exit_code:
                    return {"failed": f"exit {made.exit_code}: {log.read_text(errors='replace').strip()[-300:]}"}
                seconds += made.cpu_seconds
            samples, length = self.settings["samples"], self.settings["seq_len"]
            quality = evaluate(
                folder, self.graph, self.evaluation, samples, length, environment(), cache=self.work / "logits"
            )
        except RuntimeError as error:
            return {"failed": str(error)}
        finally:
            shutil.rmtree(output, ignore_errors=True)
        return {
            **{key: quality[key] for key in FIGURES},
            "size_bytes": quality["size_bytes"],
            "bits_per_weight": quality["quantized_bits_per_weight"],
            "float_result": False,
            "cpu_seconds": seconds,
            "peak_bytes": report.get("peak_above_baseline_bytes", report["peak_bytes"]),
            "wall_seconds": cost.wall_seconds,
        }

    @property
    def graph(self) -> Path:
        """The float graph's folder."""
        return self.models["graph"]

    def capture(self) -> None:
        """Makes the float graph and the calibration inputs, which all cells share."""
        made = ["capture-onnx-graph", "-m", str(self.models["demo"]), "-o", str(self.graph), "--quiet", "--json"]
        quantcli(made, environment())
        write_inputs(self.graph, self._text(), self.work / "inputs")

    def _text(self) -> list[str]:
        rows, length = self.settings["rows"], self.settings["seq_len"]
        return ["--data", str(self.calibration), "--num-samples", str(rows), "--seq-len", str(length)]

    def _command(self, cell: Cell, output: Path) -> list[str]:
        scheme = SCHEMES[cell.scheme]
        if cell.method in OURS:
            flags = [*OURS[cell.method], *scheme.flags]
            flags += self._text() if cell.method in CALIBRATED else []
            return quantize_command(self.graph, output, flags)
        if cell.method in CHECKPOINT:
            flags = [*CHECKPOINT[cell.method], *scheme.flags, *self._text()]
            return quantize_command(self.models["demo"], output, flags)
        settings = {"algorithm": cell.method.removeprefix("ort "), "bits": scheme.bits}
        settings |= {"group_size": scheme.group_size, "symmetric": scheme.symmetric, "rows": ORT_GPTQ_ROWS}
        worker = ROOT / "benchmarks" / "peer_workers" / "onnxruntime_worker.py"
        model, inputs = str(self.graph / "model"), str(self.work / "inputs")
        return [sys.executable, str(worker), model, inputs, str(output), json.dumps(settings)]


def write_inputs(graph: Path, text: Sequence[str], folder: Path) -> None:
    """The batches that `quantcli quantize` makes of the text, as .npz files for other tools."""
    import numpy as np

    from quantcli.cli.app import parse
    from quantcli.pipelines.graph.feeds import open_feeds
    from quantcli.pipelines.graph.source import GraphSource
    from quantcli.progress import Silent

    options = parse(["quantize", "-m", str(graph), "-o", "-", "-a", "gptq", *text]).options
    source, model = GraphSource.open(options.model)
    folder.mkdir()
    for number, feed in enumerate(open_feeds(options, model.graph, source, Silent())):
        np.savez(folder / f"{number:05}.npz", **feed)


def versions() -> str:
    """Of what computes."""
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("quantcli", "onnxruntime", "onnxruntime-genai", "torch"))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cell_arguments(__doc__, "onnx_quality.json", "onnx-quality.md")
    parser.add_argument("--samples", type=int, default=16, help="evaluation windows of seq-len tokens")
    parser.add_argument("--rows", type=int, default=64, help="calibration rows of seq-len tokens")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--model", type=Path, help="float checkpoint; default: the demo model")
    parser.add_argument("--calibration", type=Path, help="jsonl with a field text; default: the demo text")
    parser.add_argument("--evaluation", type=Path, help="other text to judge by; default: the demo text")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and its text: does everything run?")
    options = parser.parse_args(arguments)
    if not options.tiny and None in (options.model, options.calibration, options.evaluation):
        take_demo(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    chosen = [cell for cell in cells() if options.only.search(cell.name)]
    if options.list:
        print("\n".join(cell.name for cell in chosen))
        return
    with tempfile.TemporaryDirectory(prefix="quantcli-onnx-quality-") as scratch:
        work = Path(scratch)
        if options.tiny:
            write_tiny_model(work / "tiny")
            options.model, options.calibration = work / "tiny", work / "tiny" / "text.jsonl"
            options.evaluation = options.calibration
        settings = {
            "model": options.model.name, "rows": options.rows, "samples": options.samples, "seq_len": options.seq_len,
            "threads": 1, "calibration": file_digest(options.calibration),
            "evaluation": file_digest(options.evaluation),
        }  # fmt: skip
        models = {"demo": options.model.absolute(), "graph": work / "graph"}
        texts = options.calibration.absolute(), options.evaluation.absolute()
        bench = GraphBench(models, *texts, options.results, work, settings)
        bench.open()
        bench.capture()

        def write() -> None:
            write_page(options.output, bench.found, METHODS, list(SCHEMES), BEGIN_TEXT, LEGEND)

        bench.run(chosen, options.again, versions(), write, lambda _: None)


if __name__ == "__main__":
    main()
