"""What it costs to quantize one small graph, beside onnxruntime's own script: a section of docs/int8.md.

    python benchmarks/light.py [--rounds 5] [--output PAGE.md]

PP-OCR's direction classifier (0.6 MB, from PyPI) and 8 random lines of text to calibrate with. Each run is a process of
its own, start to exit: `quantcli quantize` as a user types it, and the shortest script that calls onnxruntime's
quantizer for the same (peer_light.py), once as it is and once behind its own preparation. Processes take turns, so that
whatever else the machine does meets all; told is the median.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from quality_page import circumstances, write_between
from running import ROOT, describe_machine

BEGIN, END = "<!-- light: begin -->", "<!-- light: end -->"
HERE = Path(__file__).resolve().parent
METHODS = ("dynamic", "static", "rtn")
_SAMPLES = 8
_WRITE_SAMPLES = """
import sys
import numpy as np
random = np.random.default_rng(0)
for number in range(int(sys.argv[2])):
    np.savez(f"{sys.argv[1]}/{number}.npz", x=random.uniform(-1, 1, (1, 3, 48, 192)).astype(np.float32))
"""
_LEGEND = """\
CPU is user and system time of the process from start to exit, memory its largest resident size, both the median of runs
that take turns. `onnxruntime` is the shortest script that calls `quantize_dynamic`, `quantize_static` or
`MatMulNBitsQuantizer`; `prepared` calls `quant_pre_process` before, as its documentation asks. Ours holds the checks,
the run of both graphs side by side and the times of both."""

Run = tuple[float, float]
"""CPU seconds and MB."""


def main() -> None:
    """Measures and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each; default 5")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "int8.md", help="the page")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "scripts"))
    import fetch_demo_ocr

    graph = fetch_demo_ocr.main() / "cls.onnx"
    found: dict[str, list[Run]] = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        samples = place / "samples"
        samples.mkdir()
        subprocess.run([sys.executable, "-c", _WRITE_SAMPLES, str(samples), str(_SAMPLES)], check=True)
        for number in range(options.rounds + 1):  # the first round only warms the disk up
            for method in METHODS:
                for who, command in _commands(method, graph, samples, place).items():
                    cost = _cost(command, place / "log.txt")
                    if number:
                        found.setdefault(f"{method}/{who}", []).append(cost)
                    print(f"{method}, {who}: {cost[0]:.2f} s, {cost[1]:.0f} MB", flush=True)
    stand = f"quantcli {version('quantcli')}, onnxruntime {version('onnxruntime')}, onnx {version('onnx')}"
    cell = {"date": time.strftime("%Y-%m-%d"), "version": stand, "load": load, "code": ""}
    later = cell | {"load": os.getloadavg()[0]}
    words = circumstances({"machine": describe_machine(), "cells": {"before": cell, "after": later}})
    blank = f"# Integers\n\n{BEGIN}\n{END}\n"
    write_between(options.output, BEGIN, END, "\n\n".join([words, _LEGEND, _table(found)]), blank)


def _commands(method: str, graph: Path, samples: Path, place: Path) -> Mapping[str, Sequence[str]]:
    calibration = ["--calibration-inputs", str(samples)] if method == "static" else []
    ours = [sys.executable, "-m", "quantcli", "quantize", "-m", str(graph), "-o", str(place / "Q"), "--force"]
    theirs = [sys.executable, str(HERE / "peer_light.py"), method, str(graph), str(place / "q.onnx"), str(samples)]
    prepared = {} if method == "rtn" else {"prepared": [*theirs, "prepared"]}
    return {"quantcli": [*ours, "-a", method, *calibration], "onnxruntime": theirs, **prepared}


def _cost(command: Sequence[str], log: Path) -> Run:
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {log.read_text()[-500:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def _table(found: Mapping[str, Sequence[Run]]) -> str:
    lines = ["| | quantcli | onnxruntime | prepared | times onnxruntime | times prepared |", "|" + "---|" * 6]
    for method in METHODS:
        middle = {
            who: [statistics.median(values) for values in zip(*runs, strict=True)]
            for who in ("quantcli", "onnxruntime", "prepared")
            if (runs := found.get(f"{method}/{who}"))
        }
        ours = middle["quantcli"]
        for index, (what, unit) in enumerate((("CPU", ".2f"), ("memory", ".0f"))):
            said = [f"{middle[who][index]:{unit}}" if who in middle else "" for who in middle | {"prepared": 0}]
            ratios = [
                f"{ours[index] / middle[who][index]:.1f}" if who in middle else ""
                for who in ("onnxruntime", "prepared")
            ]
            lines.append(f"| {method}, {what}, {'s' if not index else 'MB'} | {' | '.join([*said, *ratios])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
