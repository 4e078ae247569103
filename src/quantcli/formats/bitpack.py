"""Codes of 2 to 8 bits as one little-endian bit stream per column of int32 words: the layout of GPTQ checkpoints.

32 codes of b bits fill exactly b words, so every width packs without gaps; for 2, 4 and 8 bits this is the usual
"8 nibbles a word", for 3 bits it is AutoGPTQ's layout with codes that straddle words.
"""

import torch
from torch import Tensor

__all__ = ["pack_rows", "packed_words", "unpack_rows"]

_CHUNK = 1 << 22


def packed_words(count: int, bits: int) -> int:
    """Words that hold `count` codes; a last incomplete word is padded with zero bits."""
    return -(-count * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Packs along the first axis: codes [K, N] uint8 in [0, 2**bits) to words [packed_words(K), N] int32."""
    count, columns = codes.shape
    padded = -(-count // 32) * 32
    out = torch.empty(padded * bits // 32, columns, dtype=torch.int32, device=codes.device)
    step = max(32, _CHUNK // max(columns, 1) // 32 * 32)
    for start in range(0, padded, step):
        block = codes[start : start + step].to(torch.int64)
        if len(block) % 32:
            block = torch.nn.functional.pad(block, (0, 0, 0, -len(block) % 32))
        block = block.view(-1, 32, columns)
        words = torch.zeros(block.shape[0], bits, columns, dtype=torch.int64, device=codes.device)
        for index in range(32):
            word, shift = divmod(index * bits, 32)
            words[:, word] |= block[:, index] << shift
            if shift + bits > 32:
                words[:, word + 1] |= block[:, index] >> (32 - shift)
        words &= 0xFFFFFFFF
        words = torch.where(words >= 1 << 31, words - (1 << 32), words)
        out[start * bits // 32 : start * bits // 32 + words.shape[0] * bits] = words.view(-1, columns).int()
    return out[: packed_words(count, bits)].contiguous()


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_rows`: words [packed_words(count), N] int32 to codes [count, N] uint8."""
    columns = words.shape[1]
    padded = -(-count // 32) * 32
    whole = padded * bits // 32
    if len(words) < whole:
        words = torch.nn.functional.pad(words, (0, 0, 0, whole - len(words)))
    out = torch.empty(padded, columns, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    step = max(32, _CHUNK // max(columns, 1) // 32 * 32)
    for start in range(0, padded, step):
        part = (
            words[start * bits // 32 : (start + step) * bits // 32].view(-1, bits, columns).to(torch.int64) & 0xFFFFFFFF
        )
        codes = out[start : start + step].view(-1, 32, columns)
        for index in range(32):
            word, shift = divmod(index * bits, 32)
            value = part[:, word] >> shift
            if shift + bits > 32:
                value = value | (part[:, word + 1] << (32 - shift))
            codes[:, index] = (value & mask).to(torch.uint8)
    return out[:count]
