"""What every codec owes: what it packs reads back the same, sizes are as planned, and what it cannot hold it says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.formats import CODECS, awq
from quantcli.formats.codec import Described, Held
from quantcli.options import FORMATS
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

PACKED = [c for c in CODECS.values() if c.unpack is not None]


def random_tensor(rows, columns, scheme, seed=0):
    rng = np.random.default_rng(seed)
    groups = scheme.group_count(columns)
    zero = (
        np.full((rows, groups), scheme.middle)
        if scheme.symmetric
        else rng.integers(scheme.lowest_zero, scheme.levels, (rows, groups))
    )
    return QuantizedTensor(
        codes=torch.from_numpy(rng.integers(0, scheme.levels, (rows, columns)).astype(np.uint8)),
        scale=torch.from_numpy((0.01 + rng.random((rows, groups))).astype(np.float16)),
        zero=torch.from_numpy(zero.astype(np.uint8)),
        scheme=scheme,
        group=group_index(columns, scheme),
    )


def test_the_options_name_every_format():
    assert tuple(CODECS) == FORMATS


@pytest.mark.parametrize("codec", PACKED, ids=lambda c: c.name)
@given(
    bits=st.integers(1, 8), rows=st.integers(1, 50), columns=st.integers(1, 200),
    group=st.sampled_from([16, 24, 32, -1]), symmetric=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_round_trip_or_refusal(codec, bits, rows, columns, group, symmetric, seed):
    scheme = Scheme(bits, group, symmetric, codec.lowest_zero)
    if codec.refuse(Held(rows, columns, scheme, is_default=True, ordered=True)) is not None:
        return
    tensor = random_tensor(rows, columns, scheme, seed)
    stored = codec.pack(tensor)
    assert sum(t.numel() * t.element_size() for t in stored.values()) == codec.packed_bytes(rows, columns, scheme)
    read = codec.unpack(stored, scheme)
    for name in ("codes", "scale", "zero", "group"):
        assert torch.equal(getattr(read, name), getattr(tensor, name))


def test_float_is_the_dequantized_weight():
    tensor = random_tensor(5, 48, Scheme(3, 16))
    (weight,) = CODECS["float"].pack(tensor).values()
    assert torch.equal(weight, tensor.dequantize())


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (Held(8, 64, Scheme(3, 32), True, True), "4 bits, not 3"),
        (Held(9, 64, Scheme(4, 32), True, True), "multiple of 8 outputs"),
        (Held(8, 72, Scheme(4, 32), True, True), "do not divide 72"),
        (Held(8, 64, Scheme(4, 32), False, True), "one scheme"),
        (Held(8, 64, Scheme(4, 32), True, False), "neighbouring columns"),
        (Held(8, 64, Scheme(4, 32), True, True), None),
        (Held(8, 72, Scheme(4, -1), True, True), None),
    ],
)
def test_what_awq_cannot_hold(held, why):
    said = awq.CODEC.refuse(held)
    assert (said is None) if why is None else why in said


def test_awq_golden_words():
    scheme = Scheme(4, 16)
    tensor = QuantizedTensor(
        codes=torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 16).contiguous(),
        scale=torch.ones(8, 1, dtype=torch.float16),
        zero=torch.full((8, 1), 15, dtype=torch.uint8),
        scheme=scheme,
        group=group_index(16, scheme),
    )
    stored = awq.pack(tensor)
    assert stored["qweight"].tolist() == [[0x75316420]] * 16
    assert stored["qzeros"].tolist() == [[-1]]
    assert stored["scales"].shape == (1, 8)


def test_awq_config_reads_back():
    scheme = Scheme(4, 128)
    config = awq.CODEC.config(Described(scheme, {}, ["lm_head"], desc_act=False, lm_head=False, producer="p"))
    assert awq.scheme_of(config) == scheme
    assert config["modules_to_not_convert"] == ["lm_head"]
