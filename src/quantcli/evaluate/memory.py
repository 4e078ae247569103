"""How much memory a run takes."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

__all__ = ["PeakMemory", "peak_memory"]

_SAMPLE_SECONDS = 0.01


class PeakMemory:
    """The most memory that the process has taken since the watch began; may be read while it goes on."""

    def __init__(self) -> None:
        """Starts from what the process holds now."""
        self._process = psutil.Process()
        self._start = self._highest = self._process.memory_info().rss
        torch = sys.modules.get("torch")  # what does not import it allocates nothing on CUDA
        self._cuda = torch.cuda if torch is not None and torch.cuda.is_available() else None
        self._cuda_start = self._cuda.memory_allocated() if self._cuda is not None else 0
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()

    def look(self) -> None:
        """Takes a reading."""
        self._highest = max(self._highest, self._process.memory_info().rss)

    @property
    def above_start_bytes(self) -> int:
        """Highest resident memory less that at the start; on CUDA plus what torch allocated there."""
        self.look()
        on_gpu = self._cuda.max_memory_allocated() - self._cuda_start if self._cuda is not None else 0
        return int(self._highest - self._start + on_gpu)


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Watches the process's memory from a thread while the body runs."""
    result, stop = PeakMemory(), threading.Event()

    def watch() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            result.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()
        result.look()
