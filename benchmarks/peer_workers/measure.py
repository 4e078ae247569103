"""What a quantization cost its process. Nothing but Python's own library: every worker imports it.

Peak memory is what the kernel keeps (`VmHWM`), set back to the present once the tool is imported; it counts pages of
mapped files too, for every tool alike.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["Measurement"]


class Measurement:
    """Begins when the imports are done; `solved` and `done` note how far the tool is."""

    def __init__(self) -> None:
        """Notes the time, and the memory that the imports took."""
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets VmHWM back
        self._baseline = _status("VmRSS")
        self._begun, self._cpu = time.perf_counter(), time.process_time()
        self._marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Notes `NAME_seconds`: what has passed since the begin or the mark before."""
        passed = time.perf_counter() - self._begun
        self._marks[name] = passed - sum(self._marks.values())

    def done(self, folder: Path, **more: Any) -> None:
        """Writes `report.json`."""
        seconds = time.perf_counter() - self._begun
        peak = _status("VmHWM")
        report = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self._cpu,
            "baseline_bytes": self._baseline,
            "peak_bytes": peak,
            "peak_above_baseline_bytes": peak - self._baseline,
            **{f"{name}_seconds": value for name, value in self._marks.items()},
            "python": sys.version.split()[0],
            "threads": os.environ.get("OMP_NUM_THREADS"),
            **more,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(report, indent=1))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
