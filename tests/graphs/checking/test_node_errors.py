import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import small_graphs
from quantcli.algorithms import ALGORITHMS, make_options
from quantcli.errors import UsageError
from quantcli.graphs.checking.compare import compare
from quantcli.graphs.checking.node_errors import TwinError, correct_biases, measure_twins
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.rewrite.prepare import prepare


class Reader:
    """Samples that can be read again."""

    def __init__(self, count=4, shape=(4, 3, 8, 8), shift=0.3):
        self.samples = [np.random.default_rng(i).normal(size=shape).astype(np.float32) + shift for i in range(count)]
        self.rewind()

    def rewind(self):
        self.left = list(self.samples)

    def get_next(self):
        return {"x": self.left.pop(0)} if self.left else None


def quantized(tmp_path, name="static", reader=None, build=small_graphs.separable, debug=False, **settings):
    source = build(tmp_path / "f.onnx")
    prepare(source, tmp_path / "ready.onnx")
    options = make_options(ALGORITHMS[name], settings)
    result = ALGORITHMS[name].run(source, tmp_path / "q.onnx", options, reader or Reader(), None, debug)
    return result, tmp_path / "ready.onnx", tmp_path / "q.onnx"


def run(path, feed, *names):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(list(names) or None, feed)


def literal_mean(ready, made, reader, per_channel):
    """Mean over samples and pixels of Conv(QDQ(x), W') - Conv(x, W) of the first node, in plain loops."""
    w, codes = (ir.load(p).graph.initializers for p in (ready, made))
    weight = w["w1"].const_value.numpy()
    scale, zero = (codes[f"w1_{n}"].const_value.numpy().astype(np.float64) for n in ("scale", "zero_point"))
    stored = codes["w1_quantized"].const_value.numpy().astype(np.float64)
    back = np.empty_like(stored)
    for o in range(12):
        back[o] = (stored[o] - (zero[o] if per_channel else zero)) * (scale[o] if per_channel else scale)
    sx, zx = (codes[f"x_{n}"].const_value.numpy().astype(np.float64) for n in ("scale", "zero_point"))
    total, count = np.zeros(12), 0
    for x in reader.samples:
        rounded = (np.clip(np.rint(x / sx) + zx, 0, 255) - zx) * sx
        for n in range(len(x)):
            for i in range(8):
                for j in range(8):
                    for k in range(3):
                        for m in range(3):
                            r, c = i + k - 1, j + m - 1
                            if 0 <= r < 8 and 0 <= c < 8:
                                total += back[:, :, k, m] @ rounded[n, :, r, c] - weight[:, :, k, m] @ x[n, :, r, c]
                    count += 1
    return total / count


@pytest.mark.parametrize("encoding", ["qdq", "qoperator"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_mean_error_is_that_of_the_literal_version(per_channel, encoding, tmp_path):
    reader = Reader(2)
    _, ready, made = quantized(tmp_path, encoding=encoding, per_channel=str(per_channel).lower())
    errors = measure_twins(ready, made, {"first", "hidden"}, Reader(2), outputs=False)
    assert set(errors) == {"first", "hidden"}
    expected = literal_mean(ready, made, reader, per_channel)
    np.testing.assert_allclose(errors["first"].mean, expected, atol=2e-5 * np.abs(expected).max() + 1e-7)
    assert np.abs(errors["first"].mean).max() > 1e-4


@pytest.mark.parametrize("encoding", ["qdq", "qoperator"])
def test_bias_correction_takes_the_mean_error_off(encoding, tmp_path):
    """What earlier layers do to the mean, and the head that has no bias, are left."""
    found = {}
    for correction in ("false", "true"):
        result, _, made = quantized(tmp_path, encoding=encoding, bias_correction=correction)
        x = np.concatenate(Reader().samples)
        before, after = run(tmp_path / "f.onnx", {"x": x})[0], run(made, {"x": x})[0]
        found[correction] = np.abs((after - before).mean(0)).mean() / np.abs(before).mean()
        # the head is a MatMul that nothing is added to
        assert result.corrected == (() if correction == "false" else ("first", "depthwise", "grouped", "hidden"))
    assert any("head and 0 more have no bias" in note for note in result.notes)
    assert found["true"] < 0.6 * found["false"]


def test_biases_of_gemm_and_matmul_are_found(tmp_path):
    r = np.random.default_rng(0)
    b = small_graphs.Builder("n", 4)
    w = [b.weight(f"w{i}", r.normal(size=(4, 4)).astype(np.float32)) for i in range(3)]
    c = b.weight("c", np.ones(4, np.float32))
    y = b.node("Gemm", [b.x, w[0], c], "g", "scaled", beta=2.0)
    y = b.node("Add", [b.node("MatMul", [y, w[1]], "m", "product"), c], "a", "add")
    y = b.node("Gemm", [y, w[2]], "y", "bare")
    model = open_graph(b.save(tmp_path / "f.onnx", y))
    mean = np.arange(4.0)
    done, left = correct_biases(model, {n: TwinError(1, 1, mean) for n in ("scaled", "product", "bare")})
    assert done == ["scaled", "product", "bare"] and not left
    save_graph(model, tmp_path / "c.onnx")
    values = {n.name: n.inputs for n in ir.load(tmp_path / "c.onnx").graph}
    np.testing.assert_allclose(values["scaled"][2].const_value.numpy(), 1 - mean / 2)
    np.testing.assert_allclose(values["add"][1].const_value.numpy(), 1 - mean)
    np.testing.assert_allclose(values["bare"][2].const_value.numpy(), -mean)


@pytest.mark.parametrize(("name", "settings"), [
    ("static", {}), ("static", {"encoding": "qoperator", "per_channel": "true"}), ("dynamic", {}),
    ("static", {"weight_type": "int4", "activation_type": "uint16", "per_channel": "true"}),
])  # fmt: skip
def test_the_comparison_says_what_happens(name, settings, tmp_path):
    result, _, made = quantized(tmp_path, name, debug=True, **settings)
    nodes = {n.name: n for n in result.comparison.nodes}
    assert {"first", "depthwise", "grouped", "hidden", "head"} <= set(nodes) and result.comparison.samples == 4
    assert [n.own_db for n in result.comparison.nodes] == sorted(n.own_db for n in result.comparison.nodes)
    # in the model, the last node has the errors of all before; those of its own are less
    assert nodes["head"].model_db < nodes["head"].own_db
    x = np.concatenate(Reader().samples)
    before, after = run(tmp_path / "f.onnx", {"x": x})[0], run(made, {"x": x})[0]
    ratio = 10 * np.log10(np.square(before).sum() / np.square(after - before).sum())
    assert result.comparison.outputs["y"] == pytest.approx(ratio, abs=0.01 if name == "static" else 1.5)
    assert nodes["head"].model_db == pytest.approx(result.comparison.outputs["y"], abs=1.5)


def test_the_worst_node_is_the_one_that_was_made_bad(tmp_path):
    """One channel of enormous weights, read by nothing that matters, leaves few codes for the others."""

    def build(path):
        small_graphs.mlp(path, hidden=48)
        model = ir.load(path)
        up, down = (model.graph.initializers[n].const_value.numpy().copy() for n in ("w1", "w2"))
        up[:, 0], down[0] = up[:, 0] * 300, down[0] / 300
        for name, array in (("w1", up), ("w2", down)):
            model.graph.initializers[name].const_value = ir.Tensor(array)
        save_graph(model, path)
        return path

    reader = Reader(4, (16, 32))
    result, *_ = quantized(tmp_path, reader=reader, build=build, debug=True)
    assert result.comparison.nodes[0].name in ("up", "bias", "relu", "down")
    worst = result.comparison.outputs["y"]
    without, *_ = quantized(
        tmp_path, reader=Reader(4, (16, 32)), build=build, debug=True, op_types="MatMul", nodes_exclude="up"
    )
    assert without.comparison.outputs["y"] > worst


def test_a_reader_that_cannot_begin_again_is_an_error(tmp_path):
    class Once:
        def get_next(self):
            return None

    ready = prepare(small_graphs.separable(tmp_path / "f.onnx"), tmp_path / "ready.onnx") and tmp_path / "ready.onnx"
    with pytest.raises(UsageError, match=r"a comparison reads the samples a second time, Once has no rewind"):
        compare(ready, ready, {"first"}, Once())
