"""How fast a model reads and writes."""

import statistics
import time
from dataclasses import dataclass

from torch import Tensor

from quantcli.evaluate.language_model import LanguageModel

__all__ = ["Speed", "measure_speed"]

_PROMPT_TOKENS = 32
_NEW_TOKENS = 32
_REPEATS = 3


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
