"""What a run has finished, noted after every block, so that a run that was interrupted goes on from there."""

import time
from dataclasses import asdict, dataclass, field

from quantcli.folder import PartialFolder, read_state, write_json
from quantcli.pipelines.blockwise.scaling import ScaleReport
from quantcli.pipelines.blockwise.streams import Streams
from quantcli.report.layer import LayerReport
from quantcli.report.outliers import OutlierReport

__all__ = ["Journal"]


@dataclass(frozen=True)
class _Finished:
    """The file."""

    done: int
    seconds: float
    layers: list[LayerReport]
    scales: list[ScaleReport] = field(default_factory=list)
    outliers: list[OutlierReport] = field(default_factory=list)
    whole: bool = False


class Journal:
    """Finished blocks, their reports and the time that they took."""

    def __init__(self, partial: PartialFolder):
        """Takes up what an interrupted run has left; the clock starts now."""
        self.done = 0
        """Blocks that are written."""
        self.whole = False
        """Whether what stands outside them is written too."""
        self.reports: list[LayerReport] = []
        self.scales: list[ScaleReport] = []
        self.outliers: list[OutlierReport] = []
        self.seconds_before = 0.0
        """Of the interrupted runs."""
        self._state = partial.state
        self._file = partial.state / "progress.json"
        self._started = time.perf_counter()
        if partial.resumed and self._file.is_file():
            found = read_state(self._file, _Finished)
            self.done, self.seconds_before, self.whole = found.done, found.seconds, found.whole
            self.reports, self.scales, self.outliers = found.layers, found.scales, found.outliers

    def remember(self, done: int, streams: Streams) -> None:
        """Notes that blocks up to `done` are finished, in an order that a kill at any instant leaves usable."""
        streams.save(self._state, done)
        self.done = done
        self._write()
        streams.forget(self._state, done - 1)

    def close(self) -> None:
        """Notes that every tensor is written."""
        self.whole = True
        self._write()

    def _write(self) -> None:
        seconds = self.seconds_before + time.perf_counter() - self._started
        finished = _Finished(self.done, seconds, self.reports, self.scales, self.outliers, self.whole)
        write_json(self._file, asdict(finished))
