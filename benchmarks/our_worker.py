"""quantcli: `our_worker.py MODEL CALIBRATION OUTPUT SETTINGS`; what `quantcli quantize` does, in this process.

SETTINGS is JSON: fields of `QuantizeOptions`, and under `calibration` those of `CalibrationOptions`. Memory counts from
the moment when torch, transformers and quantcli are imported.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# the clock of all workers, ours and peers'
sys.path.insert(0, str(Path(__file__).resolve().parent / "peer_workers"))

import torch
from measure import Measurement

import quantcli
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines import quantize


class _Clock:
    """A `Progress` that notes when each block was done, and what the run warned of."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self.messages: list[str] = []
        self.block_seconds: list[float] = []
        self.other_seconds: dict[str, float] = {}

    def note(self, message: str) -> None:
        """Keeps it."""
        self.messages.append(message)

    warn = note

    def plan(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Keeps nothing: the result has the plan."""

    @contextmanager
    def track(self, label: str, total: float, start: float = 0) -> Iterator["_Task"]:
        """Times the steps of `quantizing`, and the whole of anything else."""
        task = _Task()
        yield task
        if label == "quantizing":
            self.block_seconds = task.seconds
        else:
            self.other_seconds[label] = self.other_seconds.get(label, 0) + time.perf_counter() - task.begun


class _Task:
    def __init__(self) -> None:
        self.begun = self.last = time.perf_counter()
        self.seconds: list[float] = []

    def advance(self, amount: float = 1, detail: str = "") -> None:
        if amount == 1:
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now


def main() -> None:
    model, calibration, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    settings: dict[str, Any] = json.loads(sys.argv[4])
    given = settings.pop("calibration", None)
    asked = CalibrationOptions(data=None if calibration == "-" else calibration, **given) if given else None
    clock = _Clock()
    measurement = Measurement()
    options = QuantizeOptions(
        model, output / "quantcli", device="cpu", **settings, **({"calibration": asked} if asked else {})
    )
    result = quantize.run(options, clock)
    assert isinstance(result, quantize.QuantizeResult)
    measurement.mark("solve")
    measurement.done(
        output,
        version=quantcli.__version__,
        torch=torch.__version__,
        settings=settings,
        bits_per_weight=result.bits_per_weight,
        size_bytes=result.size_bytes,
        plan=result.plan,
        messages=clock.messages,
        block_seconds=clock.block_seconds,
        other_seconds=clock.other_seconds,
        mean_relative_error=sum(layer.relative_error for layer in result.layers) / len(result.layers),
    )


if __name__ == "__main__":
    main()
