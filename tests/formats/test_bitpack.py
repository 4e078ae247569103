"""Packing: golden words, every width, awkward counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.formats.bitpack import pack_rows, packed_words, unpack_rows


def literal_pack(codes: list[int], bits: int) -> list[int]:
    """One column as a string of bits, least significant first, cut into 32s: the definition, character by character."""
    stream = "".join(f"{code:0{bits}b}"[::-1] for code in codes)
    stream += "0" * (-len(stream) % 32)
    words = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
    return [w - (1 << 32) if w >= 1 << 31 else w for w in words]


def test_golden_words():
    four = torch.arange(8, dtype=torch.uint8)[:, None]
    assert pack_rows(four, 4).tolist() == [[0x76543210]]
    two = torch.tensor([0, 1, 2, 3] * 4, dtype=torch.uint8)[:, None]
    assert pack_rows(two, 2).flatten().tolist() == [0xE4E4E4E4 - (1 << 32)]
    # AutoGPTQ's 3 bits: code 10 straddles the first two words, code 21 the last two
    three = torch.zeros(32, 1, dtype=torch.uint8)
    three[10], three[21] = 0b101, 0b110
    assert [w & 0xFFFFFFFF for w in pack_rows(three, 3).flatten().tolist()] == [0x40000000, 0x00000001, 0x00000003]
    assert pack_rows(torch.full((4, 1), 255, dtype=torch.uint8), 8).tolist() == [[-1]]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(1, 200), columns=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_round_trip_and_definition(bits, count, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (count, columns), dtype=torch.uint8, generator=generator)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (packed_words(count, bits), columns)
    assert words[:, -1].tolist() == literal_pack(codes[:, -1].tolist(), bits)
    assert torch.equal(unpack_rows(words, bits, count), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_long_columns(bits):
    codes = torch.randint(0, 1 << bits, (5000, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, 5000), codes)
    assert pack_rows(codes, bits)[:, 0].tolist() == literal_pack(codes[:, 0].tolist(), bits)
