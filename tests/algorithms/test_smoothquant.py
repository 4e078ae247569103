import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import small_graphs
from quantcli.algorithms import ALGORITHMS, make_options
from quantcli.algorithms.transforms.smoothquant import SmoothquantOptions, find_scale
from quantcli.errors import InputError, UsageError
from quantcli.graphs.smooth import Channels

K = 32


class Reader:
    """Rows with three channels a hundred times as large as the rest."""

    def __init__(self, count=4, seed=0):
        r = np.random.default_rng(seed)
        self.left = [{"x": r.normal(size=(2, 5, K)).astype(np.float32)} for _ in range(count)]

    def get_next(self):
        return self.left.pop() if self.left else None


def gain(r):
    sizes = r.uniform(0.5, 2, K)
    sizes[[3, 17, 20]] *= 80
    return sizes.astype(np.float32)


def block(path, norm="LayerNormalization", *, read_twice=False):
    """Norm with outlier gains, two MatMul that read it, their product, and a MatMul behind that."""
    r = np.random.default_rng(1)
    b = small_graphs.Builder("n", "t", K)

    def matrix(name, rows, columns):
        return b.weight(name, (r.normal(size=(rows, columns)) / np.sqrt(rows)).astype(np.float32))

    g, beta = b.weight("gain", gain(r)), b.weight("beta", r.normal(size=K).astype(np.float32))
    if norm == "LayerNormalization":
        y = b.node(norm, [b.x, g, beta], "normed", "norm", axis=-1)
    elif norm == "decomposed":
        y = b.node("Add", [b.node("Mul", [b.x, g], "m", "gain_mul"), beta], "normed", "beta_add")
    else:
        y = b.node("MatMul", [b.x, b.weight("w0", np.diag(g.const_value.numpy()))], "normed", "linear")
    up, gate = (
        b.node("MatMul", [y, matrix("w1", K, 48)], "u", "up"),
        b.node("MatMul", [y, matrix("w2", K, 48)], "g", "gate"),
    )
    h = b.node("Mul", [up, b.node("Sigmoid", [gate], "s", "sigmoid")], "h", "product")
    z = b.node("MatMul", [h, matrix("w3", 48, K)], "y", "down")
    if read_twice:
        z = b.node("Add", [z, y], "z", "residual")
    return b.save(path, z)


def run(path, x):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def smooth(source, target, reader=None, **settings):
    algorithm = ALGORITHMS["smoothquant"]
    return algorithm.run(source, target, make_options(algorithm, settings), reader or Reader())


def literal(seen, weights, alpha):
    s = []
    for k in range(len(seen.largest)):
        w = max(abs(v) for weight in weights for v in weight[k])
        s.append(float(seen.largest[k]) ** alpha / float(w) ** (1 - alpha))
    middle = np.sqrt(max(s) * min(s))
    return np.array(s) / middle


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_factors_equal_the_literal_version(alpha):
    r = np.random.default_rng(0)
    rows = (r.normal(size=(64, K)) * gain(r)).astype(np.float32)
    seen = Channels(np.abs(rows).max(0).astype(np.float64), rows)
    weights = [r.normal(size=(K, 16)).astype(np.float32), r.normal(size=(K, 8)).astype(np.float32)]
    found = find_scale(seen, weights, SmoothquantOptions(alpha=str(alpha)))
    np.testing.assert_allclose(found, literal(seen, weights, alpha), rtol=1e-6)


def test_the_search_takes_the_alpha_of_least_error():
    r = np.random.default_rng(0)
    rows = (r.normal(size=(64, K)) * gain(r)).astype(np.float32)
    seen, weights = Channels(np.abs(rows).max(0).astype(np.float64), rows), [r.normal(size=(K, 24)).astype(np.float32)]

    def error(s):
        x, w = rows / s, weights[0] * s[:, None]
        sx, sw = 2 * np.abs(x).max() / 255, (w.max() - w.min()) / 255
        zw = np.rint(-w.min() / sw)
        x8, w8 = np.rint(x / sx) * sx, (np.clip(np.rint(w / sw) + zw, 0, 255) - zw) * sw
        return np.square(x8 @ w8 - rows @ weights[0]).sum()

    tried = [literal(seen, weights, a) for a in np.linspace(0, 1, 21)]
    found = find_scale(seen, weights, SmoothquantOptions())
    assert error(found) <= 1.05 * min(map(error, tried))
    assert error(found) < 0.2 * error(np.ones(K))
    flat = Channels(np.ones(K), np.sign(r.normal(size=(64, K))).astype(np.float32))
    same = [np.sign(r.normal(size=(K, 8))).astype(np.float32)]
    assert find_scale(flat, same, SmoothquantOptions()) is None


@pytest.mark.parametrize("norm", ["LayerNormalization", "decomposed", "linear"])
def test_the_function_stays_and_no_node_is_added(norm, tmp_path):
    source = block(tmp_path / "f.onnx", norm)
    found = smooth(source, tmp_path / "s.onnx", alpha="0.5", nodes_include="up,gate,down")
    assert found.folded == ("normed", "h") and not found.multiplied and not found.kept
    assert len(list(ir.load(tmp_path / "s.onnx").graph)) == len(list(ir.load(source).graph))
    x = Reader(1, 9).get_next()["x"]
    before = run(source, x)
    np.testing.assert_allclose(run(tmp_path / "s.onnx", x), before, atol=2e-5 * np.abs(before).max())


def test_what_else_reads_an_activation_keeps_it(tmp_path):
    source = block(tmp_path / "f.onnx", read_twice=True)
    found = smooth(source, tmp_path / "s.onnx", alpha="0.5")
    assert found.folded == ("h",) and found.multiplied == ("normed",)
    graph = ir.load(tmp_path / "s.onnx").graph
    assert sum(n.op_type == "Mul" for n in graph) == 2
    x = Reader(1, 9).get_next()["x"]
    before = run(source, x)
    np.testing.assert_allclose(run(tmp_path / "s.onnx", x), before, atol=2e-5 * np.abs(before).max())
    found = smooth(source, tmp_path / "s.onnx", alpha="0.5", fold_only="true")
    assert found.kept == ("normed",) and not found.multiplied


@pytest.mark.parametrize("then", ["static", "dynamic"])
def test_integers_lose_far_less_behind_it(then, tmp_path):
    source = block(tmp_path / "f.onnx")
    smooth(source, tmp_path / "s.onnx")
    algorithm, x = ALGORITHMS[then], np.concatenate([f["x"] for f in Reader(4, 7).left])
    before, errors = run(source, x), {}
    for name in ("f", "s"):
        reader = Reader() if then == "static" else None
        # the norm itself is no matter of smoothquant
        options = make_options(algorithm, {"op_types": "MatMul"})
        algorithm.run(tmp_path / f"{name}.onnx", tmp_path / f"{name}q.onnx", options, reader)
        errors[name] = np.linalg.norm(run(tmp_path / f"{name}q.onnx", x) - before) / np.linalg.norm(before)
    # static rounds outputs too, which smoothing does not touch
    assert errors["s"] < {"static": 0.75, "dynamic": 0.5}[then] * errors["f"]


def test_what_cannot_be_is_an_error(tmp_path):
    source = block(tmp_path / "f.onnx")
    with pytest.raises(UsageError, match="alpha is auto or from 0 to 1, got '2'"):
        smooth(source, tmp_path / "s.onnx", alpha="2")
    with pytest.raises(UsageError, match="n_grid and rows are of alpha=auto"):
        smooth(source, tmp_path / "s.onnx", alpha="0.5", rows="8")
    with pytest.raises(UsageError, match="there are none"):
        ALGORITHMS["smoothquant"].run(source, tmp_path / "s.onnx", SmoothquantOptions(), None)
    with pytest.raises(InputError, match="no samples"):
        smooth(source, tmp_path / "s.onnx", Reader(0))
    with pytest.raises(UsageError, match="no node that can be quantized is called 'dwon'"):
        smooth(source, tmp_path / "s.onnx", nodes_include="dwon")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.onnx", "f.onnx.data"]
