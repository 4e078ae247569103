"""Codes of 1 to 8 bits as one little-endian bit stream per column of int32 words: the layout of GPTQ checkpoints.

32 codes of b bits fill exactly b words, so every width packs without gaps; for 2, 4 and 8 bits this is the usual
"8 nibbles a word", for 3 bits it is AutoGPTQ's layout with codes that straddle words.
"""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["pack_rows", "packed_words", "unpack_rows"]


def packed_words(count: int, bits: int) -> int:
    """Words that hold `count` codes; a last incomplete word is padded with zero bits."""
    return -(-count * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Packs along the first axis: codes [K, N] uint8 in [0, 2**bits) to words [packed_words(K), N] int32."""
    count, columns = codes.shape
    words = np.zeros((packed_words(count, bits), columns), dtype=np.uint32)
    _pack(np.ascontiguousarray(codes.cpu().numpy()), bits, words)
    return torch.from_numpy(words.view(np.int32)).to(codes.device)


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_rows`: words [packed_words(count), N] int32 to codes [count, N] uint8."""
    codes = np.empty((count, words.shape[1]), dtype=np.uint8)
    _unpack(np.ascontiguousarray(words.cpu().numpy()).view(np.uint32), bits, codes)
    return torch.from_numpy(codes).to(words.device)


@numba.njit(cache=True, parallel=True)
def _pack(codes: NDArray[np.uint8], bits: int, words: NDArray[np.uint32]) -> None:
    # 32 rows fill `bits` whole words: threads never share one
    for block in numba.prange((codes.shape[0] + 31) // 32):
        for row in range(block * 32, min(block * 32 + 32, codes.shape[0])):
            word, shift = row * bits // 32, np.uint32(row * bits % 32)
            for column in range(codes.shape[1]):
                words[word, column] |= np.uint32(codes[row, column]) << shift
            if shift + bits > 32:
                for column in range(codes.shape[1]):
                    words[word + 1, column] |= np.uint32(codes[row, column]) >> np.uint32(32 - shift)


@numba.njit(cache=True, parallel=True)
def _unpack(words: NDArray[np.uint32], bits: int, codes: NDArray[np.uint8]) -> None:
    mask = np.uint32((1 << bits) - 1)
    for row in numba.prange(codes.shape[0]):
        word, shift = row * bits // 32, np.uint32(row * bits % 32)
        if shift + bits > 32:
            for column in range(codes.shape[1]):
                value = words[word, column] >> shift | words[word + 1, column] << np.uint32(32 - shift)
                codes[row, column] = np.uint8(value & mask)
        else:
            for column in range(codes.shape[1]):
                codes[row, column] = np.uint8(words[word, column] >> shift & mask)
