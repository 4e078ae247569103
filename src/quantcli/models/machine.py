"""What this machine can do: its device, its free memory, and how fast it multiplies matrices, measured."""

import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import psutil
import torch

from quantcli.errors import UsageError

__all__ = ["Heap", "compute_dtype", "free_bytes", "matmul_flops", "pick_device", "settled_heap"]

_GROWTH = 64 << 20
"""Bytes by which a process may grow before freed memory is given back."""


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or cuda where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", hint="use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported", hint="use cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"there is no {name} here", hint="use --device cpu")
    return device


def free_bytes(device: torch.device) -> int:
    """Memory that is free now on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


class Heap:
    """Gives freed memory back to the system: glibc keeps the holes between live tensors otherwise.

    What is given back costs a page fault per 4 KB when it is needed again, so that it is done only where the process
    has grown by a good deal.
    """

    def __init__(self) -> None:
        """Watches from now on."""
        self._process = psutil.Process()
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        self._lowest = self._resident()

    def watch(self) -> None:
        """Gives back where the process has grown; cheap otherwise, to be called often."""
        now = self._resident()
        if self._trim is not None and now - self._lowest > _GROWTH:
            self._trim(0)
            self._lowest = self._resident()
        self._lowest = min(self._lowest, now)

    def settle(self) -> None:
        """Collects garbage and gives back what can be."""
        gc.collect()
        if self._trim is not None:
            self._trim(0)
        self._lowest = self._resident()

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)


@contextmanager
def settled_heap() -> Iterator[None]:
    """Lets garbage collections skip the objects that exist now: a full one takes 0.5 s with torch and all imported.

    Within another one it does nothing.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@cache
def matmul_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of a matrix product, measured for about 0.1 s."""
    size = 512 if device.type == "cpu" else 4096
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - start < 0.1:
        a @ b
        wait()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def compute_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype that blocks are run in: the checkpoint's own on a GPU, and on a CPU float32 unless bfloat16 is faster.

    Processors without bfloat16 instructions emulate it a hundred times slower than float32.
    """
    if device.type == "cuda":
        return stored if stored in (torch.bfloat16, torch.float16) else torch.float32
    if stored == torch.bfloat16 and matmul_flops(device, torch.bfloat16) > 1.3 * matmul_flops(device):
        return torch.bfloat16
    return torch.float32
