"""Products with a matrix that stays packed: numba kernels over the GPTQ layout for CPU, plain torch for the rest.

Symbols: K inputs, N outputs, G groups, b bits, M rows of input. `words` [W, N] uint32 holds the codes of one output as
a bit stream down its column, so neighbouring outputs are neighbours in memory and every inner loop runs over them.
"""

import threading

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["dequantize_columns", "multiply", "unpack_on_device"]

# Outputs that one task handles: their partial sums and a row of words stay in the first-level cache.
_TILE = 256
# numba's default thread pool ends the process when two threads enter it at once
_ONE_AT_A_TIME = threading.Lock()


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
    with _ONE_AT_A_TIME:
        _match_threads()
        _multiply(
            x.detach().contiguous().numpy(),
            words.numpy().view(np.uint32),
            zero.numpy(),
            scale.numpy(),
            group.numpy(),
            bits,
            out.numpy(),
        )
    return out


def dequantize_columns(
    words: Tensor, zero: Tensor, scale: Tensor, group: Tensor, bits: int, start: int, stop: int
) -> Tensor:
    """The transposed matrix for outputs [start, stop): [K, stop - start] float32; arguments as in `multiply`."""
    out = torch.empty(group.shape[0], stop - start, dtype=torch.float32)
    with _ONE_AT_A_TIME:
        _match_threads()
        _dequantize(
            words.numpy().view(np.uint32)[:, start:stop],
            zero.numpy()[:, start:stop],
            scale.numpy()[:, start:stop],
            group.numpy(),
            bits,
            out.numpy(),
        )
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


def _match_threads() -> None:
    # a user who limits torch's threads means this process, not one library in it
    wanted = max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)


@numba.njit(parallel=True, fastmath={"contract", "reassoc"}, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _multiply(
    x: NDArray[np.float32],
    words: NDArray[np.uint32],
    zero: NDArray[np.uint8],
    scale: NDArray[np.float32],
    group: NDArray[np.int32],
    bits: int,
    out: NDArray[np.float32],
) -> None:
    rows, columns = x.shape
    outputs = words.shape[1]
    mask = np.uint32((1 << bits) - 1)
    for tile in numba.prange((outputs + _TILE - 1) // _TILE):
        first = tile * _TILE
        count = min(_TILE, outputs - first)
        total = np.zeros((rows, count), np.float32)
        part = np.zeros((rows, count), np.float32)
        level = np.empty(count, np.float32)
        for k in range(columns):
            word, shift = (k * bits) >> 5, np.uint32((k * bits) & 31)
            g = group[k]
            low = words[word, first : first + count]
            z = zero[g, first : first + count]
            if shift + bits <= 32:
                for n in range(count):
                    level[n] = np.float32(np.int32((low[n] >> shift) & mask) - np.int32(z[n]))
            else:
                high = words[word + 1, first : first + count]
                back = np.uint32(32 - shift)
                for n in range(count):
                    level[n] = np.float32(np.int32(((low[n] >> shift) | (high[n] << back)) & mask) - np.int32(z[n]))
            for m in range(rows):
                value = x[m, k]
                for n in range(count):
                    part[m, n] += value * level[n]
            if k + 1 == columns or group[k + 1] != g:
                s = scale[g, first : first + count]
                for m in range(rows):
                    for n in range(count):
                        total[m, n] += part[m, n] * s[n]
                        part[m, n] = 0
        out[:, first : first + count] = total


@numba.njit(parallel=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _dequantize(
    words: NDArray[np.uint32],
    zero: NDArray[np.uint8],
    scale: NDArray[np.float32],
    group: NDArray[np.int32],
    bits: int,
    out: NDArray[np.float32],
) -> None:
    columns, outputs = out.shape
    mask = np.uint32((1 << bits) - 1)
    for k in numba.prange(columns):
        word, shift = (k * bits) >> 5, np.uint32((k * bits) & 31)
        g = group[k]
        if shift + bits <= 32:
            for n in range(outputs):
                code = (words[word, n] >> shift) & mask
                out[k, n] = np.float32(np.int32(code) - np.int32(zero[g, n])) * scale[g, n]
        else:
            back = np.uint32(32 - shift)
            for n in range(outputs):
                code = ((words[word, n] >> shift) | (words[word + 1, n] << back)) & mask
                out[k, n] = np.float32(np.int32(code) - np.int32(zero[g, n])) * scale[g, n]
