"""Folds of a graph: where there is one, scaling by it changes nothing; where scaling would change something, none."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import tiny
from onnx_graphs import N, graph_model
from quantcli.algorithms import Algorithm, Step
from quantcli.graphs.calibration.token_inputs import TokenFeeds
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.walk.folds import find_graph_folds
from quantcli.graphs.walk.matrices import Selection, find_targets, prepare, read_matrix
from quantcli.options import CaptureOptions
from quantcli.pipelines import capture
from quantcli.pipelines.graph.scaling import GraphScaling
from quantcli.scheme import Scheme
from quantcli.tensors.affine import minmax_grid, round_to_grid
from quantcli.tensors.hessian import Statistics

RANDOM = np.random.default_rng(0)
WIDTH, HIDDEN, HEADS = 16, 24, 4
SHAPES = {
    "gain": (WIDTH,), "shift": (WIDTH,), "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH),
    "vb": (WIDTH,), "o": (WIDTH, WIDTH), "gain2": (1, WIDTH), "gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN),
    "upb": (HIDDEN,), "down": (HIDDEN, WIDTH), "f1": (HIDDEN, WIDTH), "f2": (HIDDEN, WIDTH),
}  # fmt: skip
SPLIT = np.array([0, 0, HEADS, WIDTH // HEADS])
BLOCK = [
    N("LayerNormalization", "x gain shift", "n", "norm", {"axis": -1}),
    *(N("MatMul", f"n {p}", f"{p}1", p) for p in "qkv"),
    N("Add", "v1 vb", "v2", "value_bias"),
    *(N("Reshape", f"{a} split", f"{a}s", f"split_{a}") for a in ("q1", "k1", "v2")),
    N("Transpose", "q1s", "qh", "turn_q", {"perm": [0, 2, 1, 3]}),
    N("Transpose", "k1s", "kh", "turn_k", {"perm": [0, 2, 3, 1]}),
    N("Transpose", "v2s", "vh", "turn_v", {"perm": [0, 2, 1, 3]}),
    N("MatMul", "qh kh", "scores", "scores"),
    N("Softmax", "scores", "p", "softmax"),
    N("MatMul", "p vh", "mixed", "mix"),
    N("Transpose", "mixed", "mixed2", "turn_back", {"perm": [0, 2, 1, 3]}),
    N("Reshape", "mixed2 join", "a", "join"),
    N("MatMul", "a o", "o1", "out"),
    N("Add", "x o1", "r", "residual"),
    N("SimplifiedLayerNormalization", "r gain", "n2", "norm2", {"axis": -1}),
    N("Mul", "gain2 n2", "n3", "second_gain"),
    N("MatMul", "n3 gate", "g1", "gate"),
    N("Sigmoid", "g1", "g2", "sigmoid"),
    N("Mul", "g1 g2", "g3", "silu"),
    N("MatMul", "n3 up", "u1", "up"),
    N("Add", "upb u1", "u2", "up_bias"),
    N("Mul", "g3 u2", "m", "gating"),
    N("MatMul", "m down", "d", "down"),
    N("Add", "r d", "r2", "residual2"),
]


def arrays(*names):
    found = {
        n: (1 + 0.3 * RANDOM.standard_normal(s)).astype(np.float32) if "gain" in n else None for n, s in SHAPES.items()
    }
    found = {
        n: (RANDOM.standard_normal(SHAPES[n]) / 4).astype(np.float32) if a is None else a for n, a in found.items()
    }
    found |= {"split": SPLIT, "join": np.array([0, 0, WIDTH])}
    return {n: found[n] for n in names or found}


def run(model, feed):
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def targets_of(model):
    prepare(model)
    return find_targets(model.graph, Selection(op_types=("MatMul", "Gemm", "Gather")))[0]


def powers(weights, schemes, options, statistics, rows):
    """A scale of random powers of two: exact in every floating type."""
    generator = torch.Generator().manual_seed(weights[0].shape[1])
    return torch.tensor([0.25, 0.5, 2.0, 4.0])[torch.randint(4, (int(rows.max()) + 1,), generator=generator)]


def scale_everything(model, targets):
    """Scales every tensor that has a fold; the columns of what reads it are multiplied here, in the graph."""
    folds = find_graph_folds(model, targets)
    step = Step(Algorithm("powers", "transform", "", (4,), "required", dict, powers), None)
    scaling = GraphScaling(model.graph, step, folds)
    scales = {}
    for name in folds:
        readers = [t for t in targets if t.inputs == (name,)]
        width = readers[0].columns
        statistics = Statistics(torch.eye(width), 1)
        weights = [torch.from_numpy(read_matrix(model.graph, t)) for t in readers]
        scales[name] = scaling.scale(name, weights, [Scheme()] * len(readers), statistics, {}, frozenset())
    scaling.apply()
    for target in targets:
        scale = scales.get(target.inputs[0]) if len(target.inputs) == 1 else None
        if scale is not None:
            value = model.graph.initializers[target.name]
            array = value.const_value.numpy() * (scale[:, None] if target.transposed else scale[None]).numpy()
            value.const_value = ir.Tensor(array.astype(value.const_value.numpy().dtype), name=target.name)
    return folds


def test_scaling_by_the_folds_of_a_block_changes_nothing():
    model = graph_model(
        BLOCK, arrays(*(n for n in arrays() if n not in ("f1", "f2"))), outputs="r2", ranks={"x": 3, "r2": 3}
    )
    feed = {"x": RANDOM.standard_normal((2, 5, WIDTH)).astype(np.float32)}
    for axis, size in ((0, 2), (1, 5), (2, WIDTH)):
        model.graph.inputs[0].shape[axis] = size
    before, targets = run(model, feed), targets_of(model)
    folds = scale_everything(model, targets)
    assert set(folds) == {"n", "a", "n3", "m"}
    assert [folds[n].product for n in ("n", "a", "n3", "m")] == ["", "v", "", "up"]
    assert [len(folds[n].biases) for n in ("n", "a", "n3", "m")] == [1, 1, 0, 1]
    np.testing.assert_allclose(run(model, feed)[0], before[0], rtol=1e-5, atol=1e-5)
    assert "gain" in model.graph.initializers  # the other norm reads it as it was


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_gemm_behind_relu(dtype):
    weights = {
        "f1": RANDOM.standard_normal((HIDDEN, WIDTH)),
        "b": RANDOM.standard_normal(HIDDEN),
        "f2": RANDOM.standard_normal((HIDDEN, WIDTH)),
    }
    nodes = [
        N("Gemm", "x f1 b", "h", "first", {"transB": 1, "alpha": 0.5, "beta": 2.0}),
        N("Relu", "h", "r", "relu"),
        N("MatMul", "r f2", "y", "second"),
    ]
    kind = ir.DataType.FLOAT if dtype == np.float32 else ir.DataType.FLOAT16
    model = graph_model(nodes, {n: a.astype(dtype) for n, a in weights.items()}, dtype=kind)
    feed = {"x": RANDOM.standard_normal((5, WIDTH)).astype(dtype)}
    before = run(model, feed)
    assert set(scale_everything(model, targets_of(model))) == {"r"}
    np.testing.assert_allclose(run(model, feed)[0], before[0], rtol=1e-2 if dtype == np.float16 else 1e-5, atol=1e-3)


NORM = N("LayerNormalization", "x gain", "n", "norm")


@pytest.mark.parametrize(
    ("nodes", "outputs", "why"),
    [
        ([NORM, N("MatMul", "n q", "y", "a"), N("Relu", "n", "z", "b")], "y z", "somebody else reads the norm"),
        ([NORM, N("MatMul", "n q", "y", "a")], "y n", "it is an output of the graph"),
        ([NORM, N("MatMul", "n q", "y", "a"), N("MatMul", "n n2", "z", "b")], "y z", "a product without weight"),
        ([N("MatMul", "x q", "h", "a"), N("Gelu", "h", "g", "b"), N("MatMul", "g o", "y", "c")], "y", "Gelu"),
        ([N("MatMul", "x q", "h", "a"), N("Add", "h x", "g", "b"), N("MatMul", "g o", "y", "c")], "y", "a residual"),
        ([N("MatMul", "x q", "h", "a"), N("MatMul", "h o", "y", "c")], "y h", "an output on the way"),
        (
            [N("MatMul", "x q", "h", "a"), N("Mul", "h h", "g", "b"), N("MatMul", "g o", "y", "c")],
            "y",
            "it multiplies itself",
        ),
        (
            [N("MatMul", "x q", "h", "a"), N("MatMul", "h o", "y", "b"), N("MatMul", "x2 q", "z", "c")],
            "y z",
            "another product reads the weight",
        ),
        ([N("MatMul", "x q", "y", "a")], "y", "it is an input of the graph"),
    ],
)
def test_where_scaling_would_change_something(nodes, outputs, why):
    names = {name for node in nodes for name in node.inputs.split()} & set(SHAPES)
    inputs = "x" + "".join(f" {n}" for n in ("x2", "n2") if any(n in node.inputs.split() for node in nodes))
    model = graph_model(nodes, arrays(*sorted(names)), inputs, outputs)
    assert find_graph_folds(model, targets_of(model)) == {}, why


def test_a_product_that_stays_float_keeps_its_norm():
    model = graph_model(
        [NORM, N("MatMul", "n q", "y", "a"), N("MatMul", "n k", "z", "b")], arrays("gain", "q", "k"), outputs="y z"
    )
    prepare(model)
    targets, _ = find_targets(model.graph, Selection(exclude=("^b$",)))
    assert find_graph_folds(model, targets) == {}


def test_a_quantized_product_is_divided_in_its_scales():
    model = graph_model(
        [N("MatMul", "x up", "u", "a"), N("Relu", "u", "r", "b"), N("MatMul", "r down", "y", "c")], arrays("up", "down")
    )
    targets = targets_of(model)
    up = torch.from_numpy(read_matrix(model.graph, targets[0]))
    results = {"up": round_to_grid(up, *minmax_grid(up, Scheme(4, 16)), Scheme(4, 16))}
    before = results["up"].dequantize()
    step = Step(Algorithm("powers", "transform", "", (4,), "required", dict, powers), None)
    scaling = GraphScaling(model.graph, step, find_graph_folds(model, targets))
    down = [torch.from_numpy(read_matrix(model.graph, targets[1]))]
    arguments = (down, [Scheme()], Statistics(torch.eye(HIDDEN), 1))
    assert scaling.scale("r", *arguments, {}, frozenset({"up", "down"})) is None  # not solved yet
    scale = scaling.scale("r", *arguments, results, frozenset({"up", "down"}))
    assert torch.equal(results["up"].dequantize(), before / scale[:, None])
    scaling.apply()
    np.testing.assert_array_equal(model.graph.initializers["up"].const_value.numpy(), up.T.numpy())


@pytest.mark.parametrize("exporter", ["genai", "torch"])
def test_language_models(exporter, tmp_path):
    """Norms of all blocks, up to down; the value heads stand in the cache, which is an output."""
    tiny.checkpoint(tmp_path / "m", tie_word_embeddings=False)
    capture.run(CaptureOptions(str(tmp_path / "m"), tmp_path / "float", exporter=exporter))
    path = tmp_path / "float" / "model" / "model.onnx"
    model = open_graph(path)
    rows = torch.randint(0, tiny.VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(0))
    (feed,) = TokenFeeds(model.graph, rows, axes={"kv_cache_dim": 16})
    before = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)
    targets = targets_of(model)
    folds = scale_everything(model, targets)
    assert sum(bool(f.gain) for f in folds.values()) == 5  # two of each block, and the last one
    assert sum(bool(f.product) for f in folds.values()) == 2
    save_graph(model, tmp_path / "scaled.onnx")
    after = onnxruntime.InferenceSession(str(tmp_path / "scaled.onnx"), providers=["CPUExecutionProvider"]).run(
        None, feed
    )
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
