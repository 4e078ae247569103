"""What a run has finished, noted after every block, so that a run that was interrupted goes on from there."""

import json
import time
from dataclasses import asdict

from quantcli.folder import PartialFolder, write_json
from quantcli.pipelines.blockwise.scaling import ScaleReport
from quantcli.pipelines.blockwise.solve import LayerReport
from quantcli.pipelines.blockwise.streams import Streams

__all__ = ["Journal"]


class Journal:
    """Finished blocks, their reports and the time that they took."""

    def __init__(self, partial: PartialFolder):
        """Takes up what an interrupted run has left; the clock starts now."""
        self.done = 0
        """Blocks that are written."""
        self.reports: list[LayerReport] = []
        self.scales: list[ScaleReport] = []
        self.seconds_before = 0.0
        """Of the interrupted runs."""
        self._state = partial.state
        self._file = partial.state / "progress.json"
        self._started = time.perf_counter()
        if partial.resumed and self._file.is_file():
            values = json.loads(self._file.read_text())
            self.done = values["done"]
            self.seconds_before = values["seconds"]
            self.reports = [LayerReport(**layer) for layer in values["layers"]]
            self.scales = [ScaleReport(**scale) for scale in values.get("scales", [])]

    def remember(self, done: int, streams: Streams) -> None:
        """Notes that blocks up to `done` are finished, in an order that a kill at any instant leaves usable."""
        streams.save(self._state, done)
        seconds = self.seconds_before + time.perf_counter() - self._started
        layers = [asdict(layer) for layer in self.reports]
        scales = [asdict(scale) for scale in self.scales]
        write_json(self._file, {"done": done, "seconds": seconds, "layers": layers, "scales": scales})
        streams.forget(self._state, done - 1)
        self.done = done
