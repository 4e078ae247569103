"""Reading AWQ gemm: golden words, random tensors packed by a literal writer, refusals."""

import pytest
import torch

from quantcli.errors import InputError
from quantcli.formats import awq
from quantcli.scheme import Scheme

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def literal_words(values: torch.Tensor) -> torch.Tensor:
    """[R, N] codes to [R, N / 8] words, nibble by nibble."""
    rows = []
    for row in values.tolist():
        words = []
        for start in range(0, len(row), 8):
            word = sum(row[start + output] << (4 * place) for place, output in enumerate(ORDER))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def test_golden_word():
    # outputs 0 to 7 hold the codes 0 to 7: from the low nibble up 0 2 4 6 1 3 5 7
    tensors = {
        "qweight": torch.tensor([[0x75316420]] * 16, dtype=torch.int32),
        "qzeros": torch.tensor([[0x11111111]], dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    q = awq.unpack(tensors, Scheme(4, 16))
    assert q.codes[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert q.dequantize()[:, 0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, -1])
def test_random_tensor(dtype, group_size):
    g = torch.Generator().manual_seed(0)
    scheme = Scheme(4, group_size)
    groups = scheme.group_count(96)
    codes = torch.randint(0, 16, (96, 40), generator=g)
    zeros = torch.randint(0, 16, (groups, 40), generator=g)
    scales = torch.rand(groups, 40, generator=g).to(dtype)
    q = awq.unpack({"qweight": literal_words(codes), "qzeros": literal_words(zeros), "scales": scales}, scheme)
    expected = (codes - zeros.repeat_interleave(96 // groups, 0)) * scales.float().repeat_interleave(96 // groups, 0)
    assert torch.equal(q.dequantize(), expected.T)
    assert q.scale.dtype == dtype
    assert q.ordered


def test_fixed_zero_point():
    config = {"bits": 4, "group_size": 32, "zero_point": False, "version": "GEMM"}
    scheme = awq.scheme_of(config)
    assert scheme.symmetric
    q = awq.unpack({"qweight": torch.zeros(32, 1, dtype=torch.int32), "scales": torch.ones(1, 8)}, scheme)
    assert torch.equal(q.dequantize(), torch.full((8, 32), -8.0))


@pytest.mark.parametrize("config", [{"bits": 8, "version": "gemm"}, {"bits": 4, "version": "gemv"}])
def test_layouts_that_are_not_read(config):
    with pytest.raises(InputError, match="4 bits and 'gemm' are read"):
        awq.scheme_of(config)


def test_shapes_that_do_not_fit():
    good = {
        "qweight": torch.zeros(64, 2, dtype=torch.int32),
        "qzeros": torch.zeros(2, 2, dtype=torch.int32),
        "scales": torch.ones(2, 16),
    }
    awq.unpack(good, Scheme(4, 32))
    for name, tensor in {
        "scales": torch.ones(3, 16),
        "qzeros": torch.zeros(2, 3, dtype=torch.int32),
    }.items():
        with pytest.raises(InputError, match=f"{name} has shape"):
            awq.unpack(good | {name: tensor}, Scheme(4, 32))
    with pytest.raises(InputError, match="axes"):
        awq.unpack(good | {"scales": torch.ones(3)}, Scheme(4, 32))
