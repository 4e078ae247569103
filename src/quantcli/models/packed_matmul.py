"""Products with a matrix that stays packed: numba kernels over the GPTQ layout for CPU, plain torch for the rest.

Symbols: K inputs, N outputs, G groups, b bits, M rows of input. `words` [W, N] int32 holds the codes of one output as a
bit stream down its column, so neighbouring outputs are neighbours in memory and every inner loop runs over them.

The kernels are serial and shared out over a pool of threads here: numba's own pool costs milliseconds per call on a
busy machine, a token takes hundreds of calls, and two threads that enter it at once end the process.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["dequantize_columns", "multiply", "share_out", "unpack_on_device"]

# Outputs that are worked on together: their partial sums and a row of words stay in the first-level cache.
_TILE = 256
# Rows up to which unpacking anew for each of them is faster than unpacking once into a buffer.
_WHOLE_WORDS_ROWS = 2
# Weights that are worth waking another thread for.
_SHARE = 1 << 20


def multiply(x: Tensor, words: Tensor, zero: Tensor, scale: Tensor, group: Tensor, bits: int) -> Tensor:
    """Multiplies a few rows without unpacking the matrix anywhere but in registers.

    Args:
        x: [M, K] float32.
        words: [W, N] int32.
        zero: [G, N] uint8.
        scale: [G, N] float32.
        group: [K] int32 in [0, G).
        bits: Bits per code.

    Returns:
        [M, N] float32: x @ dequantized.T, summed in float32.
    """
    out = torch.empty(x.shape[0], words.shape[1], dtype=torch.float32)
    groups = group.numpy()
    by_words = len(x) <= _WHOLE_WORDS_ROWS and _groups_hold_whole_words(groups, bits)
    kernel = _whole_words_kernel(bits) if by_words else _multiply
    arrays = x.detach().contiguous().numpy(), words.numpy(), zero.numpy(), scale.numpy(), groups, bits, out.numpy()
    share_out(lambda start, stop: kernel(*arrays, start, stop), out.shape[1], x.shape[1])
    return out


def dequantize_columns(
    words: Tensor, zero: Tensor, scale: Tensor, group: Tensor, bits: int, start: int, stop: int
) -> Tensor:
    """The transposed matrix for outputs [start, stop): [K, stop - start] float32; arguments as in `multiply`."""
    out = torch.empty(group.shape[0], stop - start, dtype=torch.float32)
    arrays = words.numpy(), zero.numpy(), scale.numpy(), group.numpy(), bits, start, out.numpy()
    share_out(lambda first, last: _dequantize(*arrays, first, last), stop - start, group.shape[0])
    return out


def unpack_on_device(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of [W, N] words where they are, on any device and from any thread: [count, N] int32."""
    position = torch.arange(count, device=words.device) * bits
    word, shift = position >> 5, (position & 31).int()[:, None]
    # int32 shifts drag the sign along: only the bits that come from this word are kept
    kept = (1 << (32 - shift).clamp(max=bits)) - 1
    codes = (words[word] >> shift) & kept
    split = torch.nonzero(shift[:, 0] + bits > 32)[:, 0] if 32 % bits else position[:0]
    if len(split):
        codes[split] |= (words[word[split] + 1] << (32 - shift[split])) & ((1 << bits) - 1)
    return codes


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="packed")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def share_out(work: Callable[[int, int], Any], outputs: int, columns: int) -> None:
    """Calls `work(start, stop)` over stretches of outputs, on as many of torch's threads as the size is worth."""
    # a user who limits torch's threads means this process, not one library in it
    parts = max(1, min(torch.get_num_threads(), outputs * columns // _SHARE, -(-outputs // _TILE)))
    step = -(-outputs // parts // _TILE) * _TILE
    stretches = [(n, min(n + step, outputs)) for n in range(0, outputs, step)]
    others = [_pool().submit(work, *stretch) for stretch in stretches[1:]]
    work(*stretches[0])
    for other in others:
        other.result()


def _groups_hold_whole_words(group: NDArray[np.int32], bits: int) -> bool:
    """Whether no code straddles two words and all codes of a word share a group."""
    per = 32 // bits
    if 32 % bits or len(group) % per:
        return False
    by_word = group.reshape(-1, per)
    return bool((by_word == by_word[:, :1]).all())


@cache
def _whole_words_kernel(bits: int) -> Callable[..., None]:
    """The product for bits that divide 32: with constant shifts a word's codes are unrolled, in half the time."""
    per = 32 // bits
    mask = np.uint32((1 << bits) - 1)

    @numba.njit(fastmath={"contract", "reassoc"}, cache=True, nogil=True)
    def multiply_whole_words(
        x: NDArray[np.float32],
        words: NDArray[np.int32],
        zero: NDArray[np.uint8],
        scale: NDArray[np.float32],
        group: NDArray[np.int32],
        _: int,
        out: NDArray[np.float32],
        start: int,
        stop: int,
    ) -> None:
        rows, columns = x.shape
        for first in range(start, stop, _TILE):
            count = min(_TILE, stop - first)
            middle = np.empty(count, np.float32)
            total = np.zeros((rows, count), np.float32)
            part = np.zeros((rows, count), np.float32)
            for k in range(0, columns, per):
                g = group[k]
                if k == 0 or group[k - 1] != g:
                    z = zero[g, first : first + count]
                    for n in range(count):
                        middle[n] = z[n]
                packed = words[k // per, first : first + count]
                for m in range(rows):
                    values = x[m, k : k + per]
                    sums = part[m]
                    for n in range(count):
                        word, at_zero = np.int32(packed[n]), middle[n]
                        of_word = np.float32(0)
                        for i in range(per):
                            code = (word >> np.int32(i * bits)) & mask
                            of_word += values[i] * (np.float32(code) - at_zero)
                        sums[n] += of_word
                if k + per == columns or group[k + per] != g:
                    s = scale[g, first : first + count]
                    for m in range(rows):
                        for n in range(count):
                            total[m, n] += part[m, n] * s[n]
                            part[m, n] = 0
            out[:, first : first + count] = total

    return multiply_whole_words  # type: ignore[no-any-return]


@numba.njit(fastmath={"contract", "reassoc"}, cache=True, nogil=True)
def _multiply(
    x: NDArray[np.float32],
    words: NDArray[np.int32],
    zero: NDArray[np.uint8],
    scale: NDArray[np.float32],
    group: NDArray[np.int32],
    bits: int,
    out: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    rows, columns = x.shape
    for first in range(start, stop, _TILE):
        count = min(_TILE, stop - first)
        middle = np.empty(count, np.float32)
        level = np.empty(count, np.float32)
        total = np.zeros((rows, count), np.float32)
        part = np.zeros((rows, count), np.float32)
        for k in range(columns):
            g = group[k]
            if k == 0 or group[k - 1] != g:
                z = zero[g, first : first + count]
                for n in range(count):
                    middle[n] = z[n]
            _read_levels(words, k * bits, bits, first, middle, level)
            for m in range(rows):
                value, sums = x[m, k], part[m]
                for n in range(count):
                    sums[n] += value * level[n]
            if k + 1 == columns or group[k + 1] != g:
                s = scale[g, first : first + count]
                for m in range(rows):
                    for n in range(count):
                        total[m, n] += part[m, n] * s[n]
                        part[m, n] = 0
        out[:, first : first + count] = total


@numba.njit(cache=True, nogil=True)
def _dequantize(
    words: NDArray[np.int32],
    zero: NDArray[np.uint8],
    scale: NDArray[np.float32],
    group: NDArray[np.int32],
    bits: int,
    offset: int,
    out: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    for first in range(start, stop, _TILE):
        count = min(_TILE, stop - first)
        middle = np.empty(count, np.float32)
        for k in range(len(group)):
            g = group[k]
            if k == 0 or group[k - 1] != g:
                z = zero[g, offset + first : offset + first + count]
                for n in range(count):
                    middle[n] = z[n]
            row = out[k, first : first + count]
            _read_levels(words, k * bits, bits, offset + first, middle, row)
            s = scale[g, offset + first : offset + first + count]
            for n in range(count):
                row[n] *= s[n]


@numba.njit(cache=True, nogil=True, inline="always")
def _read_levels(
    words: NDArray[np.int32],
    bit: int,
    bits: int,
    first: int,
    middle: NDArray[np.float32],
    level: NDArray[np.float32],
) -> None:
    """Code minus zero point of one input and a tile of outputs; the code starts at `bit` of each column."""
    count = len(level)
    mask = np.uint32((1 << bits) - 1)
    word, shift = bit >> 5, np.uint32(bit & 31)
    low = words[word, first : first + count]
    if shift + bits <= 32:
        for n in range(count):
            level[n] = np.float32(np.int32((np.uint32(low[n]) >> shift) & mask)) - middle[n]
    else:
        high, back = words[word + 1, first : first + count], np.uint32(32 - shift)
        for n in range(count):
            code = ((np.uint32(low[n]) >> shift) | (np.uint32(high[n]) << back)) & mask
            level[n] = np.float32(np.int32(code)) - middle[n]
