import numpy as np
import pytest
import torch

from quantcli.graphs.weights.blocks import pack_codes, plan_blocks, unpack_codes
from quantcli.scheme import PER_CHANNEL, Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index


def random_tensor(rows, columns, scheme, shuffled=False):
    random = torch.Generator().manual_seed(0)
    groups = scheme.group_count(columns)
    group = group_index(columns, scheme)
    if shuffled:
        group = group[torch.randperm(columns, generator=random)]
    return QuantizedTensor(
        codes=torch.randint(0, scheme.levels, (rows, columns), generator=random, dtype=torch.uint8),
        scale=torch.randn(rows, groups, generator=random).half(),
        zero=torch.randint(0, scheme.levels, (rows, groups), generator=random, dtype=torch.uint8),
        scheme=scheme,
        group=group,
    )


def literal(tensor, layout):
    """Each block's codes, scale and zero, one number at a time; columns back in their place."""
    packed, scales, zeros = layout.codes(tensor), layout.scales(tensor), layout.zeros(tensor)
    rows, columns = tensor.shape
    out = np.zeros((rows, columns), np.float32)
    for n in range(rows):
        for k in range(layout.blocks * layout.block_size):
            block, at = divmod(k, layout.block_size)
            bit = at * layout.bits
            code = (int(packed[n, block, bit // 8]) >> (bit % 8)) & ((1 << layout.bits) - 1)
            bit = block * layout.bits
            zero = (int(zeros[n, bit // 8]) >> (bit % 8)) & ((1 << layout.bits) - 1)
            value = np.float32(code - zero) * scales[n, block]
            column = k if layout.columns is None else int(layout.columns[k])
            if 0 <= column < columns:
                out[n, column] = value
            else:
                assert column >= columns or value == 0
    return out


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("columns", "group_size"), [(96, 32), (72, 64), (100, PER_CHANNEL), (640, 512), (90, 40), (50, 23), (17, 16)]
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_blocks_hold_the_same_values(bits, columns, group_size, shuffled):
    tensor = random_tensor(3, columns, Scheme(bits, group_size), shuffled)
    layout = plan_blocks(tensor.group, bits)
    assert np.array_equal(literal(tensor, layout), tensor.dequantize().numpy())


@pytest.mark.parametrize(
    ("columns", "group_size", "bits", "expected"),
    [
        (4096, 128, 4, (4, 128, 32)),
        (576, 128, 4, (4, 64, 9)),  # the last group has 64 columns; padding it to 128 would cost more
        (576, 64, 3, (4, 64, 9)),
        (4096, PER_CHANNEL, 5, (8, 256, 16)),
        (96, 32, 2, (2, 32, 3)),
    ],
)
def test_the_smallest_layout_is_chosen(columns, group_size, bits, expected):
    layout = plan_blocks(group_index(columns, Scheme(bits, group_size)), bits)
    assert (layout.bits, layout.block_size, layout.blocks) == expected and layout.columns is None


def test_shuffled_groups_of_whole_blocks_need_no_filler():
    group = group_index(128, Scheme(4, 32))[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    layout = plan_blocks(group, 4)
    assert sorted(layout.columns.tolist()) == list(range(128))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 16])
def test_packed_codes_round_trip(bits, count):
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    assert np.array_equal(unpack_codes(pack_codes(codes, bits), bits, count), codes)


def test_first_code_lies_lowest():
    assert pack_codes(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack_codes(np.array([[1, 2, 3, 0, 1]], np.uint8), 2).tolist() == [[0b00111001, 0b01]]
