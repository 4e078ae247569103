import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import literal
import small_graphs
from quantcli.algorithms import ALGORITHMS, make_options
from quantcli.algorithms.transforms.smoothquant import SmoothquantOptions, find_scale, find_tensor_scale
from quantcli.errors import InputError, UsageError
from quantcli.scheme import Scheme
from quantcli.tensors.channels import Channels

K = 32
ON_GRAPHS = ALGORITHMS["smoothquant"].on_graphs
INT8 = Scheme(8, -1, symmetric=True)


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
    return ON_GRAPHS.run(source, target, make_options(ON_GRAPHS, settings), reader or Reader())


def channels(rows, held_out=None):
    """What a walk knows of rows, and of rows that only judge."""
    seen = Channels(rows.shape[1], 256)
    seen.add(torch.from_numpy(rows), judges=held_out is None)
    if held_out is not None:
        seen.add(torch.from_numpy(held_out), measures=False)
    return seen


def outliers(r, outputs=(24, 8)):
    """Rows with channels a hundred times as large as the rest, rows to judge by, and weights [N, K] that read them."""
    g = gain(r)
    rows = [(r.normal(size=(64, K)) * g).astype(np.float32) for _ in range(2)]
    return *rows, [r.normal(size=(n, K)).astype(np.float32) for n in outputs]


def torched(arrays):
    return [torch.from_numpy(a) for a in arrays]


def natural(columns=K):
    return torch.arange(columns)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_factors_equal_the_literal_version(alpha):
    rows, _, weights = outliers(np.random.default_rng(0))
    seen, options = channels(rows), SmoothquantOptions(alpha=str(alpha))
    expected = literal.smoothing(np.abs(rows).max(0), weights, alpha)
    for found in (
        find_scale(["q", "k"], torched(weights), [INT8] * 2, options, seen, natural()),
        find_tensor_scale(["q", "k"], torched(weights), options, seen),
    ):
        np.testing.assert_allclose(found.scale, expected, rtol=1e-6)
        assert found.alpha == alpha and found.relative_error is None


@pytest.mark.parametrize(("a_bits", "w_bits"), [(8, 8), (4, 8), (8, 4)])
def test_the_search_equals_the_literal_version(a_bits, w_bits):
    """Magnitudes from some rows, errors on others."""
    rows, judges, weights = outliers(np.random.default_rng(0))
    clip = 1.0 if a_bits == 8 else 0.9

    def error(*parts):
        return literal.rounded_products(*parts, a_bits, w_bits, clip)

    expected, alpha = literal.smoothquant(judges, np.abs(rows).max(0), weights, 10, error)
    options = SmoothquantOptions(n_grid=10, a_bits=a_bits)
    schemes = [Scheme(w_bits, -1, symmetric=True)] * 2
    found = find_scale(["q", "k"], torched(weights), schemes, options, channels(rows, judges), natural())
    assert found.alpha == alpha and 0 < alpha < 1
    np.testing.assert_allclose(found.scale, expected, rtol=1e-6)
    s = expected
    products = [judges @ w.T for w in weights]
    ratio = error(judges / s, [w * s for w in weights], products) / error(judges, weights, products)
    assert found.relative_error == pytest.approx(ratio, rel=1e-3) and ratio < 0.6
    own = SmoothquantOptions(n_grid=10, a_bits=a_bits, w_bits=w_bits)  # w_bits stands above the rounder's grid
    again = find_scale(["q", "k"], torched(weights), [Scheme(2, 16)] * 2, own, channels(rows, judges), natural())
    assert again.alpha == alpha


def test_columns_of_shared_heads_take_one_factor():
    rows, judges, weights = outliers(np.random.default_rng(3), outputs=(16,))
    columns = [(k // 8 // 2) * 8 + k % 8 for k in range(K)]  # pairs of heads of 8 read one value head

    def error(*parts):
        return literal.rounded_products(*parts, 8, 8)

    expected, _ = literal.smoothquant(judges, np.abs(rows).max(0), weights, 10, error, columns)
    options, shared = SmoothquantOptions(n_grid=10), torch.tensor(columns)
    found = find_scale(["o"], torched(weights), [INT8], options, channels(rows, judges), shared)
    assert found.scale.shape == (16,)
    np.testing.assert_allclose(found.scale, expected, rtol=1e-6)


def test_factors_that_help_only_the_rows_that_they_were_made_of_are_dropped():
    r = np.random.default_rng(0)
    rows, _, weights = outliers(r)
    judges = r.normal(size=(64, K)).astype(np.float32)  # without the outliers
    options = SmoothquantOptions(n_grid=4)
    assert find_scale(["q"], torched(weights), [INT8] * 2, options, channels(rows), natural()).scale is not None
    found = find_scale(["q"], torched(weights), [INT8] * 2, options, channels(rows, judges), natural())
    assert (found.scale, found.alpha, found.relative_error) == (None, None, 1.0)
    nobody = channels(rows, judges[:0])
    assert find_scale(["q"], torched(weights), [INT8] * 2, options, nobody, natural()).scale is None


def test_inputs_that_never_came_and_weights_of_zero_do_no_harm():
    rows, judges, weights = outliers(np.random.default_rng(0))
    rows[:, 5] = judges[:, 5] = 0
    weights[0][:, 7] = weights[1][:, 7] = 0
    for alpha in ("auto", "0", "1"):
        options = SmoothquantOptions(alpha=alpha)
        found = find_scale(["q", "k"], torched(weights), [INT8] * 2, options, channels(rows, judges), natural())
        assert torch.isfinite(found.scale).all() and (found.scale > 0).all()


def test_an_alpha_for_each_layer():
    options = SmoothquantOptions(alpha="down_proj=0.8, o_proj|v_proj=auto,0.5")
    assert options.alpha_of(["a.q_proj", "a.k_proj"]) == 0.5
    assert options.alpha_of(["a.down_proj"]) == 0.8
    assert options.alpha_of(["a.q_proj", "a.v_proj"]) is None
    assert options.searches and options.patterns == ("down_proj", "o_proj|v_proj")
    assert not SmoothquantOptions(alpha="down_proj=0.8,0.5").searches
    assert SmoothquantOptions(alpha="down_proj=0.8").searches
    assert SmoothquantOptions(alpha="proj=0.8,down_proj=0.2").alpha_of(["down_proj"]) == 0.2


def test_the_search_takes_the_alpha_of_least_error():
    r = np.random.default_rng(0)
    rows, _, weights = outliers(r, outputs=(24,))

    def error(x, weights, products):
        w = weights[0]
        sx, sw = 2 * np.abs(x).max() / 255, (w.max() - w.min()) / 255
        zw = np.rint(-w.min() / sw)
        x8, w8 = np.rint(x / sx) * sx, (np.clip(np.rint(w / sw) + zw, 0, 255) - zw) * sw
        return np.square(x8 @ w8.T - products[0]).sum()

    best, _ = literal.smoothquant(rows, np.abs(rows).max(0), weights, 20, error)
    found = find_tensor_scale(["up"], torched(weights), SmoothquantOptions(), channels(rows)).scale.numpy()
    product = [rows @ weights[0].T]
    ours, least, none = (error(rows / s, [weights[0] * s], product) for s in (found, best, np.ones(K)))
    assert ours <= 1.05 * least and ours < 0.2 * none
    flat = channels(np.sign(r.normal(size=(64, K))).astype(np.float32))
    same = [torch.from_numpy(np.sign(r.normal(size=(8, K))).astype(np.float32))]
    assert find_tensor_scale(["up"], same, SmoothquantOptions(), flat).scale is None


def test_bits_of_the_search_on_graphs():
    """With few bits for weights, less is moved into them."""
    rows, _, weights = outliers(np.random.default_rng(0))
    fine, coarse = (
        find_tensor_scale(["up"], torched(weights), SmoothquantOptions(w_bits=bits), channels(rows)).alpha
        for bits in (8, 3)
    )
    assert coarse < fine


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


def test_nodes_may_have_an_alpha_of_their_own(tmp_path):
    source, graphs = block(tmp_path / "f.onnx"), {}
    for name, alpha in {"all": "0.5", "one": "down=0.9,0.5"}.items():
        smooth(source, tmp_path / f"{name}.onnx", alpha=alpha)
        graphs[name] = ir.load(tmp_path / f"{name}.onnx").graph.initializers
    one, other = ({n: g[n].const_value.numpy() for n in ("gain", "w2", "w3")} for g in graphs.values())
    assert np.array_equal(one["gain"], other["gain"]) and np.array_equal(one["w2"], other["w2"])
    assert not np.allclose(one["w3"], other["w3"])


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
    with pytest.raises(UsageError, match="are of alpha=auto"):
        smooth(source, tmp_path / "s.onnx", alpha="0.5", rows="8")
    with pytest.raises(UsageError, match="there are none"):
        ON_GRAPHS.run(source, tmp_path / "s.onnx", SmoothquantOptions(), None)
    with pytest.raises(UsageError, match="no node that is smoothed is called 'dwon', which has an alpha"):
        smooth(source, tmp_path / "s.onnx", alpha="dwon=0.5,auto")
    with pytest.raises(InputError, match="no samples"):
        smooth(source, tmp_path / "s.onnx", Reader(0))
    with pytest.raises(UsageError, match="no node that can be quantized is called 'dwon'"):
        smooth(source, tmp_path / "s.onnx", nodes_include="dwon")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.onnx", "f.onnx.data"]
