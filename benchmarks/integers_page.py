"""The results of integers.py as a section of a page: per model what each method keeps of it, and what it costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_page import BEGIN as WEIGHTS_BEGIN
from quality_page import END as WEIGHTS_END
from quality_page import circumstances, write_between

__all__ = ["write_section"]

BEGIN, END = "<!-- integers: begin -->", "<!-- integers: end -->"
_BLANK = f"# ONNX graphs: quality\n\n{WEIGHTS_BEGIN}\n{WEIGHTS_END}\n\n## Integers\n\n{BEGIN}\n{END}\n"
_LEGEND = """\
Accuracy is the share of right answers, ± its standard error; agreement the share of answers that are the float graph's,
which tells methods apart where the accuracies do not; SQNR is the signal to quantization noise of what they are read
from. Size is that of the files beside the float graph's. Latency is
the time of a run in units of the float graph's, both with one thread: the median of pairs of runs in turn, in brackets
the quartiles. `ort` is onnxruntime's own `quantize_dynamic` or `quantize_static` with its defaults, behind its own
preparation, on the same calibration batches; `products` is MatMul and Gather alone."""


def write_section(path: Path, found: Mapping[str, Any], methods: Mapping[str, Sequence[str]]) -> None:
    """Writes the measured part of the section, and leaves what people wrote around it.

    Args:
        path: The page; made where there is none.
        found: Results.
        methods: Rows, by model.
    """
    parts = [circumstances(found), _LEGEND]
    for model, rows in methods.items():
        own = {name.split("/", 1)[1]: c for name, c in found["cells"].items() if name.startswith(f"{model}/")}
        if "float32" in own:
            parts.append(_table(own, [row for row in rows if row in own], cosine=model == "minilm"))
    write_between(path, BEGIN, END, "\n\n".join(parts), _BLANK)


def _table(own: Mapping[str, Any], rows: Sequence[str], cosine: bool) -> str:
    plain = own["float32"]
    shown = {"accuracy": "accuracy" in plain, "agreement": True, "SQNR": True, "cosine": cosine}
    columns = ["", *(name for name, there in shown.items() if there), "size", "latency"]
    lines = [f"### {plain['title']}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cell = own[row]
        if "failed" in cell:
            lines.append(f"| {row} | failed |" + " |" * (len(columns) - 2))
            continue
        said = {"size": f"{cell['size_bytes'] / 1e6:.2f} MB", "latency": "1"}
        if "accuracy" in cell:
            error = (cell["accuracy"] * (1 - cell["accuracy"]) / plain["rows"]) ** 0.5
            said["accuracy"] = f"{cell['accuracy']:.1%} ± {error:.1%}"
        if row != "float32":
            low, high = cell["latency_quartiles"]
            said |= {
                "agreement": f"{cell['agreement']:.1%}",
                "SQNR": f"{cell['sqnr_db']:.1f} dB" if "sqnr_db" in cell else "",
                "cosine": f"{cell['cosine']:.3f}",
                "size": f"{cell['size_bytes'] / plain['size_bytes']:.0%}",
                "latency": f"{cell['latency_ratio']:.2f} ({low:.2f} to {high:.2f})",
            }
        lines.append(f"| {row} | {' | '.join(said.get(column, '') for column in columns[1:])} |")
    return "\n".join(lines)
