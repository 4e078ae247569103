import pytest
import torch

from quantcli.graphs.weights.checkpoint_rows import Rows
from quantcli.graphs.weights.rows import RowRange


def test_rows_follow_what_exporters_do():
    q, k = Rows.whole("q", 8, 16), Rows.whole("k", 4, 16)
    joined = torch.cat([q, k], dim=0).reshape(12, 16)
    assert joined.T.shape == (16, 12) and joined.T.transposed
    assert joined.T.ranges == (RowRange("q", 0, 8), RowRange("k", 0, 4))
    cut = joined[6:10, :]
    assert cut.ranges == (RowRange("q", 6, 8), RowRange("k", 0, 2)) and cut.shape == (4, 16)
    assert joined.T[:, 8:].ranges == (RowRange("k", 0, 4),)
    first, second = joined.split([8, 4])
    assert (first.ranges, second.ranges) == (q.ranges, k.ranges)
    assert joined.permute(1, 0).transposed and not joined.T.t().transposed
    parameter = torch.nn.Parameter(cut, requires_grad=False)
    assert isinstance(parameter, Rows) and parameter.ranges == cut.ranges
    assert cut.to(torch.float16).ranges == cut.ranges


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w * 2,
        lambda w: w[:, 2:4],
        lambda w: w[::2],
        lambda w: w.reshape(4, 32),
        lambda w: torch.cat([w, torch.zeros(1, 16)]),
        lambda w: torch.cat([w, w], dim=1),
        lambda w: w.permute(0, 1).sum(),
    ],
)
def test_arithmetic_on_a_name_is_refused(operation):
    with pytest.raises(TypeError, match=r"only named|Rows"):
        operation(Rows.whole("w", 8, 16))


def test_keeping_the_axes_is_no_transpose():
    assert not Rows.whole("w", 8, 16).permute(0, 1).transposed
