"""The results of quality.py as Markdown: per model, what each method keeps of it and what that costs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

__all__ = ["BEGIN", "END", "circumstances", "write_between", "write_page"]

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
_TITLES = {
    "demo": "The demo model",
    "folded": "The demo model with its norms folded",
}
_WRITER = "Written by `benchmarks/quality.py`; what stands between the two marks is replaced by each run."
_LEGEND = """\
KL is the mean divergence of the float model's distribution from the quantized model's in nats per token, ± its
standard error clustered by window; in brackets the perplexity. Cost is the size of the weight files (embedding and
norms stay float), the processor seconds of `quantcli quantize` from start to exit, and its peak memory above what the
process held when it began. `best` is `--preset best` (awq, then gptq with refit and sweeps), `quarot,best` the same
behind a rotation; awq is followed by kquant where no rounder is named. In an order, ≈ joins methods whose KL differs
by less than the larger standard error. A cell that is empty was not measured, or the method has no such scheme. A
rotation folds the norms itself, so that it makes the same of both models: its rows stand with the second."""


def write_page(
    path: Path,
    found: Mapping[str, Any],
    methods: Sequence[str],
    schemes: Sequence[str],
    writer: str = _WRITER,
    legend: str = _LEGEND,
) -> None:
    """Writes the measured part of the page, and leaves what people wrote around it.

    Args:
        path: The page; made where there is none.
        found: Results.
        methods: Rows.
        schemes: Columns.
        writer: What a new page says about where it comes from.
        legend: What the figures are.
    """
    blank = f"# Quality\n\n{writer}\n\n{BEGIN}\n{END}\n"
    write_between(path, BEGIN, END, _measured(found, methods, schemes, legend), blank)


def write_between(path: Path, begin: str, end: str, measured: str, blank: str) -> None:
    """Writes what was measured between two marks of a page; a page that is not there is `blank` before.

    Raises:
        SystemExit: the page has no such marks.
    """
    text = path.read_text() if path.is_file() else blank
    if begin not in text or end not in text:
        raise SystemExit(f"{path} has no lines {begin} and {end} to write between")
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{begin}\n{measured}\n{end}{after}")


def _measured(found: Mapping[str, Any], methods: Sequence[str], schemes: Sequence[str], legend: str) -> str:
    parts = [_circumstances(found), legend]
    for model, title in _TITLES.items():
        own = {name.split("/", 1)[1]: cell for name, cell in found["cells"].items() if name.startswith(f"{model}/")}
        if not own:
            continue
        done = [cell for cell in own.values() if "failed" not in cell]
        if done:
            title += f" (perplexity {done[0]['reference_perplexity']:.2f})"
        rows = [m for m in methods if any(f"{m}/{s}" in own for s in schemes)]
        parts.append(f"## {title}")
        if rows:
            parts.append(_matrix("KL (perplexity)", own, rows, schemes, _quality))
            parts += [line for s in schemes if (line := _order(own, rows, s))]
            parts.append(_matrix("cost", own, rows, schemes, _cost))
        mixed = {name.split("/", 1)[1]: cell for name, cell in own.items() if name.startswith("mixed/")}
        if mixed:
            parts.append(_mixed(mixed, own.get("gptq/3b g64", {}), own.get("gptq/4b g64 asym", {})))
    return "\n\n".join(parts)


def _circumstances(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    return circumstances(
        found,
        f" Model {settings['model']}, {settings['rows']} x {settings['seq_len']} tokens to calibrate, "
        f"{settings['samples']} x {settings['seq_len']} tokens of other articles to judge. Processor seconds are those "
        f"of {settings['threads']} thread{'s' if settings['threads'] > 1 else ''}.",
    )


def circumstances(found: Mapping[str, Any], settings: str = "") -> str:
    """When, with what and on which machine results were measured.

    Args:
        found: Results.
        settings: Sentences about how.
    """
    machine = found["machine"]
    dates = sorted({cell["date"] for cell in found["cells"].values()}) or ["no date yet"]
    versions = sorted({cell["version"] for cell in found["cells"].values()})
    loads = [cell["load"] for cell in found["cells"].values()] or [0.0]
    codes = {cell["code"] for cell in found["cells"].values()}
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    words = (
        f"{when}, {'; '.join(versions)}; {machine['cores']} cores of {machine['processor']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, Python {machine['python']}.{settings} The machine also did other "
        f"work (load {min(loads):.1f} to {max(loads):.1f})."
    )
    if len(codes) > 1:
        words += f" The code changed between cells ({len(codes)} versions)."
    return fill(words, 120, break_on_hyphens=False)


def _matrix(title: str, own: Mapping[str, Any], rows: Sequence[str], columns: Sequence[str], show: Any) -> str:
    lines = [f"| {title} | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for row in rows:
        cells = [own.get(f"{row}/{column}") for column in columns]
        shown = ["" if c is None else "failed" if "failed" in c else show(c) for c in cells]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _quality(cell: Mapping[str, Any]) -> str:
    return f"{cell['kl_mean']:.4f} ± {cell['kl_standard_error'] or 0:.4f} ({cell['perplexity']:.2f})"


def _cost(cell: Mapping[str, Any]) -> str:
    size = "float" if cell["float_result"] else f"{cell['size_bytes'] / 1e6:.0f} MB"
    return f"{size}, {cell['cpu_seconds']:.0f} s, {cell['peak_bytes'] / 1e9:.2f} GB"


def _order(own: Mapping[str, Any], methods: Sequence[str], scheme: str) -> str:
    """Methods by KL, joined by ≈ where they differ by less than the larger standard error."""
    found = [(m, own[f"{m}/{scheme}"]) for m in methods if "kl_mean" in own.get(f"{m}/{scheme}", {})]
    found.sort(key=lambda pair: pair[1]["kl_mean"])
    if len(found) < 2:
        return ""
    words = found[0][0]
    for (_, last), (name, cell) in pairwise(found):
        error = max(last["kl_standard_error"] or 0, cell["kl_standard_error"] or 0)
        words += f" {'≈' if cell['kl_mean'] - last['kl_mean'] < error else '<'} {name}"
    return f"{scheme}: {words}"


def _mixed(mixed: Mapping[str, Any], three: Mapping[str, Any], four: Mapping[str, Any]) -> str:
    """Bits per layer between gptq's uniform 3 and 4 bits, and what the straight line between those says."""
    known = "kl_mean" in three and "kl_mean" in four
    lines = ["| gptq, g64 | bits per weight | KL (perplexity) | KL on the line from 3 to 4 | cost |", "|" + "---|" * 5]
    for name, cell in {"uniform 3": three, **mixed, "uniform 4": four}.items():
        if "kl_mean" not in cell:
            lines.append(f"| {name} | | {'failed' if cell else ''} | | |")
            continue
        line = ""
        if known and name in mixed:
            low, high = three["bits_per_weight"], four["bits_per_weight"]
            share = (cell["bits_per_weight"] - low) / (high - low)
            line = f"{three['kl_mean'] + share * (four['kl_mean'] - three['kl_mean']):.4f}"
        lines.append(f"| {name} | {cell['bits_per_weight']:.2f} | {_quality(cell)} | {line} | {_cost(cell)} |")
    return "\n".join(lines)
