"""The figures are those of the plain formula, and what cannot be compared is said."""

import numpy as np
import onnx_ir as ir
import pytest

from onnx_graphs import N, graph_model
from quantcli.errors import InputError
from quantcli.graphs.checking.side_by_side import GraphRunError, run_side_by_side

RANDOM = np.random.default_rng(0)
W = RANDOM.normal(size=(16, 8)).astype(np.float32)
FEEDS = [{"x": RANDOM.normal(size=(5, 16)).astype(np.float32)} for _ in range(3)]


def graph(path, weight=W, *more, outputs="y", whole=""):
    """x times a weight and what follows; outputs that are whole numbers are named by `whole`."""
    model = graph_model([N("MatMul", "x w", "y", "product"), *more], {"w": weight}, outputs=outputs, opset=17)
    for value in model.graph.outputs:
        if value.name in whole.split():
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), None
    model.ir_version = 9
    ir.save(model, path)
    return path


def test_figures_are_those_of_the_formula(tmp_path):
    other = W + 0.05 * RANDOM.normal(size=W.shape).astype(np.float32)
    found = run_side_by_side(graph(tmp_path / "a.onnx"), graph(tmp_path / "b.onnx", other), FEEDS)
    one, two = (np.concatenate([f["x"] @ w for f in FEEDS]).astype(np.float64) for w in (W, other))
    (output,) = found.outputs
    assert output.sqnr_db == pytest.approx(10 * np.log10((one**2).sum() / ((two - one) ** 2).sum()), abs=1e-3)
    assert output.largest == pytest.approx(np.abs(two - one).max(), abs=1e-5)
    assert output.top1 == pytest.approx((one.argmax(1) == two.argmax(1)).mean())
    assert found.samples == 3 and found.float_ms > 0 and found.quantized_ms > 0
    assert found.below(10) == [] and found.below(60) == [output]


def test_the_same_graph_has_no_noise(tmp_path):
    found = run_side_by_side(graph(tmp_path / "a.onnx"), graph(tmp_path / "b.onnx"), FEEDS)
    assert found.outputs[0].sqnr_db == 200 and found.outputs[0].top1 == 1


@pytest.mark.parametrize("scale", [np.float32(1e38), np.float32(np.nan)])
def test_what_is_not_finite_falls_below_any_limit(tmp_path, scale):
    found = run_side_by_side(
        graph(tmp_path / "a.onnx"),
        graph(tmp_path / "b.onnx", W * scale * 100 if np.isnan(scale) else np.full_like(W, scale)),
        FEEDS,
    )
    assert not found.outputs[0].finite and found.below(-300) == [found.outputs[0]]
    assert found.below(0) == [] and "not finite" in str(found)


def test_minus_infinity_of_a_mask_is_no_noise(tmp_path):
    nodes = N("Relu", "y", "r", "relu"), N("Log", "r", "z", "log")  # -inf where nothing is positive
    one, other = (graph(tmp_path / n, W, *nodes, outputs="z") for n in ("a.onnx", "b.onnx"))
    found = run_side_by_side(one, other, FEEDS)
    assert found.outputs[0].finite and found.outputs[0].sqnr_db == 200


def test_whole_numbers_and_selections_have_no_ratio(tmp_path):
    more = (
        N("ArgMax", "y", "best", "argmax", {"axis": -1, "keepdims": 0}),
        N("Relu", "y", "r", "relu"),
        N("NonZero", "r", "chosen", "nonzero"),
    )
    other = -W
    named = {"outputs": "best chosen", "whole": "best chosen"}
    found = run_side_by_side(
        graph(tmp_path / "a.onnx", W, *more, **named), graph(tmp_path / "b.onnx", other, *more, **named), FEEDS
    )
    best, chosen = found.outputs
    one, two = (np.concatenate([f["x"] @ w for f in FEEDS]).argmax(1) for w in (W, other))
    assert best.sqnr_db is None and best.top1 == pytest.approx((one == two).mean())
    assert chosen.reshaped > 0 and "another shape" in str(chosen)


def test_who_cannot_run_is_told_apart(tmp_path):
    good, bad = graph(tmp_path / "a.onnx"), graph(tmp_path / "b.onnx", W[:8])
    with pytest.raises(GraphRunError):
        run_side_by_side(good, bad, FEEDS)
    with pytest.raises(InputError) as raised:
        run_side_by_side(bad, good, FEEDS)
    assert not isinstance(raised.value, GraphRunError)
