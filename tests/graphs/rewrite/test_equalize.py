import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import small_graphs
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.rewrite.equalize import equalize
from quantcli.graphs.rewrite.prepare import prepare

PAIRS = [("first", "depthwise"), ("depthwise", "grouped"), ("grouped", "hidden"), ("hidden", "head")]


def run(path, x):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def equalized(source, tmp_path):
    prepare(source, tmp_path / "ready.onnx")
    model = open_graph(tmp_path / "ready.onnx")
    pairs = equalize(model)
    save_graph(model, tmp_path / "equal.onnx")
    return pairs, tmp_path / "equal.onnx"


def weights(path):
    return {n: v.const_value.numpy() for n, v in ir.load(path).graph.initializers.items()}


def literal(w):
    """Channel by channel, pair by pair, as the paper writes it."""
    w = {n: a.astype(np.float64) for n, a in w.items()}

    def columns(name, i):
        """What multiplies channel i, as a list of views."""
        if name == "w2":
            return [w["w2"][i, 0]]
        if name == "w3":
            return [w["w3"][o, i % 6] for o in range(8) if o // 4 == i // 6]
        if name == "w4":
            return [w["w4"][:, i * 16 : (i + 1) * 16]]
        return [w["w5"][i]]

    for _ in range(50):
        for first, second in (("w1", "w2"), ("w2", "w3"), ("w3", "w4"), ("w4", "w5")):
            for i in range(len(w[first])):
                r1 = np.abs(w[first][i]).max()
                r2 = max(np.abs(part).max() for part in columns(second, i))
                s = np.sqrt(r1 * r2) / r2
                w[first][i] /= s
                for part in columns(second, i):
                    part *= s
                if bias := {"w1": "b1", "w4": "b4"}.get(first):
                    w[bias][i] /= s
    return w


def test_equals_the_literal_version_and_keeps_the_function(tmp_path):
    source = small_graphs.separable(tmp_path / "f.onnx")
    pairs, path = equalized(source, tmp_path)
    assert pairs == PAIRS
    found, expected = weights(path), literal(weights(source))
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=5e-3, err_msg=name)
    x = np.random.default_rng(5).normal(size=(4, 3, 8, 8)).astype(np.float32)
    before = run(source, x)
    np.testing.assert_allclose(run(path, x), before, atol=1e-5 * np.abs(before).max())


def test_both_ranges_of_a_channel_are_the_same_afterwards(tmp_path):
    found = weights(equalized(small_graphs.separable(tmp_path / "f.onnx"), tmp_path)[1])
    np.testing.assert_allclose(np.abs(found["w1"]).max((1, 2, 3)), np.abs(found["w2"]).max((1, 2, 3)), rtol=5e-3)
    np.testing.assert_allclose(np.abs(found["w4"]).max(1), np.abs(found["w5"]).max(1), rtol=5e-3)


def test_what_is_read_elsewhere_clipped_or_an_output_is_no_pair(tmp_path):
    r = np.random.default_rng(0)
    b = small_graphs.Builder("n", 4, 6, 6)
    w = [b.weight(f"w{i}", r.normal(size=(4, 4, 1, 1)).astype(np.float32)) for i in range(5)]
    y = b.node("Conv", [b.x, w[0]], "c0", "read_twice")
    y = b.node("Add", [b.node("Conv", [y, w[1]], "c1", "branch"), y], "a", "sum")
    y = b.node("Conv", [y, w[2]], "c2", "before_clip")
    low, high = b.weight("low", np.float32(0)), b.weight("high", np.float32(6))
    y = b.node("Clip", [y, low, high], "k", "relu6")
    seen = b.node("Conv", [y, w[3]], "c3", "output")
    y = b.node("Conv", [seen, w[4]], "c4", "last")
    assert equalized(b.save(tmp_path / "f.onnx", seen, y), tmp_path)[0] == []


def test_a_weight_that_two_layers_share_is_changed_for_one_only(tmp_path):
    r = np.random.default_rng(0)
    b = small_graphs.Builder("n", 4, 6, 6)
    w = b.weight("w", (r.normal(size=(4, 4, 1, 1)) * np.array([1, 9, 0.1, 3])[:, None, None, None]).astype(np.float32))
    y = b.node("Relu", [b.node("Conv", [b.x, w], "c0", "first")], "r", "relu")
    source = b.save(tmp_path / "f.onnx", b.node("Conv", [y, w], "y", "second"))
    pairs, path = equalized(source, tmp_path)
    assert pairs == [("first", "second")] and len(weights(path)) == 2
    x = r.normal(size=(2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(path, x), run(source, x), atol=1e-4)


@pytest.mark.parametrize("dead", ["row", "column"])
def test_channels_that_are_never_used_stay_as_they_are(dead, tmp_path):
    r = np.random.default_rng(0)
    b = small_graphs.Builder("n", 5)
    first, second = r.normal(size=(5, 6)).astype(np.float32), r.normal(size=(6, 3)).astype(np.float32)
    if dead == "row":
        first[:, 2] = 0
    else:
        second[2] = 0
    y = b.node("MatMul", [b.x, b.weight("w1", first)], "h", "up")
    y = b.node("MatMul", [y, b.weight("w2", second)], "y", "down")
    source = b.save(tmp_path / "f.onnx", y)
    found = weights(equalized(source, tmp_path)[1])
    assert np.isfinite(found["w1"]).all() and np.isfinite(found["w2"]).all()
    x = r.normal(size=(3, 5)).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path / "equal.onnx", x), run(source, x), atol=1e-5)
