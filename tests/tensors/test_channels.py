"""Largest magnitudes and sample rows do not depend on how tokens come in."""

import pytest
import torch

from quantcli.tensors.channels import Channels


def tokens(count=1000, columns=12):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(0))


def gathered(x, sizes, rows=16):
    seen = Channels(x.shape[1], rows)
    for part in torch.split(x, sizes):
        seen.add(part)
    return seen


@pytest.mark.parametrize("sizes", [1000, 10, 1, 333, [1, 998, 1]])
def test_batches_do_not_matter(sizes):
    x = tokens()
    seen, whole = gathered(x, sizes), gathered(x, 1000)
    assert torch.equal(seen.largest, x.abs().amax(0)) and seen.tokens == 1000
    assert torch.equal(seen.sample(), whole.sample())


def test_rows_are_spread_over_all_tokens():
    x = torch.arange(1000.0)[:, None].expand(-1, 3)
    found = gathered(x, 7).sample()[:, 0]
    assert len(found) == 16
    assert found[0] < 64 and found[-1] > 900 and (found.diff() < 130).all() and (found.diff() > 0).all()
    assert torch.equal(gathered(x[:9], 4).sample(), x[:9])


def test_what_is_kept_does_not_grow():
    seen = Channels(12, 16)
    for _ in range(100):
        seen.add(tokens(50))
        assert sum(map(len, seen._kept)) <= 32


def test_some_tokens_measure_and_others_judge():
    x, seen = tokens(), Channels(12, 2000)
    seen.add(x[None, :600], judges=False)
    seen.add(100 * x[600:], measures=False)
    assert torch.equal(seen.largest, x[:600].abs().amax(0)) and seen.tokens == 600
    assert torch.equal(seen.sample(), 100 * x[600:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"judges": False}, {"measures": False}])
def test_what_is_no_number_is_noticed(bad, settings):
    x, seen = tokens(), Channels(12, 4)
    assert seen.is_finite()
    x[501, 3] = bad  # in no row that is kept
    seen.add(x, **settings)
    assert not seen.is_finite()


def test_no_tokens_are_nothing():
    seen = Channels(12, 4)
    seen.add(tokens(0))
    assert seen.tokens == 0 and seen.sample().shape == (0, 12) and not seen.largest.any()
