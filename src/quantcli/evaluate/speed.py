"""How fast a model reads and writes, and how much memory that takes."""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from quantcli.evaluate.language_model import LanguageModel

__all__ = ["PeakMemory", "Speed", "measure_speed", "peak_memory"]

_PROMPT_TOKENS = 32
_NEW_TOKENS = 32
_REPEATS = 3
_SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Speed:
    """Medians of a few runs."""

    prefill_tokens_per_second: float
    """Reading a prompt of one window."""
    decode_tokens_per_second: float
    """Writing token by token after a short prompt, batch of one."""


def measure_speed(model: LanguageModel, tokens: Tensor) -> Speed:
    """Times a model on its own; tokens [T] int64 is the prompt to read."""
    if model.max_positions is not None:
        tokens = tokens[: model.max_positions - 1]  # room for the answer
    prompt = tokens[: min(_PROMPT_TOKENS, (len(tokens) + 1) // 2)]
    model.start(prompt, room=4)  # first use compiles kernels and reserves memory
    for _ in range(3):
        model.step()
    reading, writing = [], []
    room = _NEW_TOKENS
    if model.max_positions is not None:
        room = max(2, min(room, model.max_positions - len(prompt)))
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        model.start(tokens, room=1)
        model.step()
        reading.append(len(tokens) / (time.perf_counter() - begin))
        model.start(prompt, room)
        model.step()  # the prompt's own answer: the model has not run on a new token yet
        begin = time.perf_counter()
        for _ in range(room - 1):
            model.step()
        writing.append((room - 1) / (time.perf_counter() - begin))
    return Speed(statistics.median(reading), statistics.median(writing))


class PeakMemory:
    """The most memory that the process has taken since the watch began; may be read while it goes on."""

    def __init__(self) -> None:
        """Starts from what the process holds now."""
        self._process = psutil.Process()
        self._start = self._highest = self._process.memory_info().rss
        self._on_cuda = torch.cuda.is_available()
        self._cuda_start = torch.cuda.memory_allocated() if self._on_cuda else 0
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()

    def look(self) -> None:
        """Takes a reading."""
        self._highest = max(self._highest, self._process.memory_info().rss)

    @property
    def above_start_bytes(self) -> int:
        """Highest resident memory less that at the start; on CUDA plus what torch allocated there."""
        self.look()
        on_gpu = torch.cuda.max_memory_allocated() - self._cuda_start if self._on_cuda else 0
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
