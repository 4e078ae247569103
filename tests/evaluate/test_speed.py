"""Timing a model whose speed is known, and memory that is known."""

import mmap
import time

import pytest
import torch

from quantcli.evaluate.memory import peak_memory
from quantcli.evaluate.speed import measure_speed


class Clockwork:
    """Takes 1 ms per prompt token and 10 ms per new token, as the runtimes do: the first step only reads a result."""

    max_positions = 64

    def __init__(self):
        self.longest = 0
        self.fresh = False

    def start(self, tokens, room):
        self.room, self.length = room, len(tokens)
        time.sleep(0.001 * len(tokens))
        self.fresh = True

    def step(self):
        if not self.fresh:
            time.sleep(0.01)
            self.length += 1
        self.fresh = False
        self.longest = max(self.longest, self.length)
        return 0


def test_known_speeds():
    model = Clockwork()
    speed = measure_speed(model, torch.zeros(48, dtype=torch.int64))
    assert speed.prefill_tokens_per_second == pytest.approx(1000, rel=0.4)
    assert speed.decode_tokens_per_second == pytest.approx(100, rel=0.4)
    assert speed.decode_tokens_per_second <= 100
    assert model.longest <= model.max_positions


def test_peak_memory_sees_what_is_gone_at_the_end():
    with peak_memory() as watched:
        block = mmap.mmap(-1, 50_000_000)  # fresh pages: a heap might hand out memory that it holds already
        block.write(bytes(1) * 50_000_000)
        time.sleep(0.1)
        block.close()
    assert 45e6 < watched.above_start_bytes < 150e6
