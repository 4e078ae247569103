import numpy as np
import onnx_ir as ir
import pytest
import torch

from quantcli.errors import InputError
from quantcli.graphs.calibration.token_inputs import TokenFeeds

CACHE = ("batch", 2, "past", 8)


def graph(**shapes):
    """Inputs of these shapes: floats for caches, whole numbers else."""
    kinds = {n: ir.DataType.FLOAT16 if n.startswith("past") else ir.DataType.INT64 for n in shapes}
    inputs = [ir.Value(name=n, type=ir.TensorType(kinds[n]), shape=ir.Shape(s)) for n, s in shapes.items()]
    return ir.Graph(inputs, [], nodes=[], name="g")


def test_batches():
    rows = torch.arange(15).reshape(3, 5)
    pair = ("batch", "tokens")
    wanted = graph(input_ids=pair, attention_mask=pair, position_ids=pair, **{"past_key_values.0.key": CACHE})
    feeds = TokenFeeds(wanted, rows, batch_size=2)
    first, last = list(feeds)
    assert len(feeds) == 2
    np.testing.assert_array_equal(first["input_ids"], [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(last["input_ids"], [[10, 11, 12, 13, 14]])
    np.testing.assert_array_equal(first["attention_mask"], np.ones((2, 5)))
    np.testing.assert_array_equal(first["position_ids"], [[0, 1, 2, 3, 4]] * 2)
    assert first["past_key_values.0.key"].shape == (2, 2, 0, 8)
    assert first["past_key_values.0.key"].dtype == np.float16


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": ("n", 4)}, "has no input_ids, its inputs are x"),
        ({"input_ids": ("b", "t"), "pixels": ("b", 3)}, "nothing about the graph's input 'pixels'"),
        ({"input_ids": ("b", "t"), "past": ("b", "heads", "t", 8)}, "axes of unknown length"),
    ],
)
def test_graphs_that_tokens_do_not_fill(shapes, message):
    with pytest.raises(InputError, match=message):
        list(TokenFeeds(graph(**shapes), torch.zeros(1, 3, dtype=torch.int64)))
