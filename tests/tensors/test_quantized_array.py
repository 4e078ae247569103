import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.scheme import PER_CHANNEL, Scheme
from quantcli.tensors.affine import minmax_grid, round_to_grid
from quantcli.tensors.hessian import output_error
from quantcli.tensors.quantized_array import array_error, concatenate_arrays, round_array


@st.composite
def cases(draw):
    bits = draw(st.integers(1, 8))
    symmetric = draw(st.booleans())
    group_size = draw(st.sampled_from([PER_CHANNEL, 16, 23, 32, 128]))
    lowest = draw(st.sampled_from([0, 1]))
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    w = random.standard_normal((rows, columns)) * 10.0 ** draw(st.integers(-9, 7))
    kind = draw(st.sampled_from(["normal", "ties", "zeros", "positive"]))
    if kind == "ties":  # -a and a in one group, weights halfway between two codes
        w = np.rint(w / np.abs(w).max() * 4) / 4
    elif kind == "zeros":
        w[random.random(rows) < 0.5] = 0
    elif kind == "positive":
        w = np.abs(w)
    return w.astype(np.float32), Scheme(bits, group_size, symmetric, lowest), draw(st.sampled_from([1.0, 0.83]))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_it_is_what_torch_computes_bit_for_bit(case):
    weight, scheme, clip = case
    w = torch.from_numpy(weight)
    wanted, found = round_to_grid(w, *minmax_grid(w, scheme, clip), scheme), round_array(weight, scheme, clip)
    for name in ("codes", "scale", "zero", "group"):
        one, other = getattr(wanted, name).numpy(), getattr(found, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    values = wanted.dequantize()
    np.testing.assert_array_equal(values.numpy(), found.dequantize())
    assert array_error(weight, found.dequantize()) == pytest.approx(output_error(w, values), rel=1e-3)


def test_many_rows_go_over_all_cores():
    weight = np.random.default_rng(0).standard_normal((1000, 700)).astype(np.float32)
    scheme = Scheme(4, 64, False)
    whole = round_array(weight, scheme)
    parts = [whole.rows(0, 300), whole.rows(300, 1000)]
    w = torch.from_numpy(weight)
    wanted = round_to_grid(w, *minmax_grid(w, scheme), scheme)
    np.testing.assert_array_equal(wanted.codes.numpy(), whole.codes)
    stacked = concatenate_arrays([round_to_grid(w[:300], *minmax_grid(w[:300], scheme), scheme), parts[1]])
    np.testing.assert_array_equal(stacked.dequantize(), whole.dequantize())
