import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_graphs import N, graph_model
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.rewrite.fusions import fuse_operators
from quantcli.graphs.rewrite.prepare import prepare

R = np.random.default_rng(0)
X = R.normal(size=(2, 6, 8)).astype(np.float32)
CONSTANTS = {
    "two": np.array(2, np.float32),
    "root": np.array(2**0.5, np.float32),
    "share": np.array(0.5**0.5, np.float32),
    "one": np.array(1, np.float32),
    "half": np.array([0.5], np.float32),
    "eps": np.array(1e-5, np.float32),
    "gain": R.uniform(0.5, 2, 8).astype(np.float32),
    "bias": R.normal(size=8).astype(np.float32),
}
GELUS = {
    "torch": [
        N("Div", "x root", "d", "d"), N("Erf", "d", "e", "e"), N("Add", "e one", "a", "a"), N("Mul", "x a", "m", "m"),
        N("Mul", "m half", "y", "h"),
    ],
    "keras": [
        N("Div", "x root", "d", "d"), N("Erf", "d", "e", "e"), N("Add", "one e", "a", "a"),
        N("Mul", "a half", "m", "m"), N("Mul", "x m", "y", "h"),
    ],
    "tensorflow": [
        N("Mul", "x share", "d", "d"), N("Erf", "d", "e", "e"), N("Add", "e one", "a", "a"),
        N("Mul", "half a", "m", "m"), N("Mul", "m x", "y", "h"),
    ],
}  # fmt: skip


def norm(axes=(-1,), tail=("gain", "bias"), square="Pow", **attributes):
    """Parts of a LayerNormalization of x."""
    over = {"axes": list(axes), **attributes}
    parts = [
        N("ReduceMean", "x", "mean", "mean", over),
        N("Sub", "x mean", "s", "sub"),
        N("Pow", "s two", "p", "pow") if square == "Pow" else N("Mul", "s s", "p", "pow"),
        N("ReduceMean", "p", "v", "var", over),
        N("Add", "v eps", "ve", "add_eps"),
        N("Sqrt", "ve", "q", "sqrt"),
        N("Div", "s q", "n", "div"),
    ]
    ends = [N("Mul", f"n {tail[0]}", "g", "scale")] + ([N("Add", f"g {tail[1]}", "y", "shift")] if tail[1:] else [])
    last = ends[-1]
    return [*parts, *ends[:-1], N(last.op, last.inputs, "y", last.name)]


def fused(tmp_path, nodes, weights=None, outputs="y", layer_norms=False, opset=17, fixed=False, sizes=(), x=X):
    """Operators after fusing, and their number; the function is compared."""
    used = {name for n in nodes for name in n.inputs.split()}
    given = {**CONSTANTS, **(weights or {})}
    ranks = {name: x.ndim for name in ("x", *outputs.split())}
    model = graph_model(nodes, {k: v for k, v in given.items() if k in used}, outputs=outputs, opset=opset, ranks=ranks)
    if fixed:
        model.graph.inputs[0].shape = ir.Shape(x.shape)
    if sizes:
        model.graph.outputs[0].shape = ir.Shape(sizes)
    save_graph(model, tmp_path / "plain.onnx")
    prepare(tmp_path / "plain.onnx", tmp_path / "ready.onnx")
    made, counts = fuse_operators(tmp_path / "ready.onnx", layer_norms=layer_norms)
    save_graph(made, tmp_path / "fused.onnx")
    before, after = (
        ort.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for name in ("plain.onnx", "fused.onnx")
    )
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    found = open_graph(tmp_path / "fused.onnx")
    assert [v.name for v in found.graph.outputs] == outputs.split()
    assert all(v.uses() for v in found.graph.initializers.values())
    return [n.op_type for n in found.graph], counts


@pytest.mark.parametrize("kind", GELUS)
@pytest.mark.parametrize("opset", [13, 17, 20])
def test_gelu(opset, kind, tmp_path):
    assert fused(tmp_path, GELUS[kind], opset=opset) == (["Gelu"], {"Gelu": 1})


@pytest.mark.parametrize("square", ["Pow", "Mul"])
def test_layer_norm(square, tmp_path):
    nodes = norm(square=square)
    assert fused(tmp_path, nodes, layer_norms=True) == (["LayerNormalization"], {"LayerNormalization": 1})
    kinds, counts = fused(tmp_path, nodes)
    assert "LayerNormalization" not in kinds and not counts


def test_large_constants_lie_in_the_file_beside(tmp_path):
    x = np.random.default_rng(1).normal(size=(2, 512)).astype(np.float32)
    wide = {name: np.resize(CONSTANTS[name], 512) for name in ("gain", "bias")}
    assert fused(tmp_path, norm(), wide, layer_norms=True, x=x)[0] == ["LayerNormalization"]
    # neither is a sequence that ends in a large matrix a reason to stop
    nodes = [*GELUS["torch"][:2], N("Add", "e wide", "y", "a")]
    assert not fused(tmp_path, nodes, {"wide": x}, x=x)[1]


@pytest.mark.parametrize(("nodes", "weights"), [
    (norm(axes=(1,)), {}),
    (norm(axes=(0,)), {}),
    (norm(axes=(1, 2)), {}),
    (norm(), {"gain": np.array([2], np.float32), "bias": np.array([1], np.float32)}),
    (norm(tail=("gain",)), {}),
], ids=["axis 1", "axis 0", "two axes", "one gain for all", "no bias"])  # fmt: skip
def test_what_is_no_layer_norm_stays(nodes, weights, tmp_path):
    for fixed in (False, True):
        kinds, counts = fused(tmp_path, nodes, weights, layer_norms=True, fixed=fixed)
        assert not counts and kinds.count("ReduceMean") == 2


@pytest.mark.parametrize("axis", [-1, 2])
def test_axes_count_from_either_end(axis, tmp_path):
    assert fused(tmp_path, norm(axes=(axis,)), layer_norms=True)[1] == {"LayerNormalization": 1}


def test_parts_that_others_read_stay(tmp_path):
    for outputs in ("y e", "y d"):
        kinds, counts = fused(tmp_path, GELUS["torch"], outputs=outputs)
        assert not counts and "Erf" in kinds
    assert not fused(tmp_path, norm(), outputs="y n", layer_norms=True)[1]
    assert not fused_beside_a_branch(tmp_path)


def fused_beside_a_branch(tmp_path):
    """What is fused where a branch reads a part of a Gelu."""
    model = graph_model(GELUS["torch"], {k: CONSTANTS[k] for k in ("root", "one", "half")}, ranks={"x": 3, "y": 3})
    erf = next(n for n in model.graph if n.op_type == "Erf").outputs[0]
    branches = []
    for op_type in ("Abs", "Neg"):
        node = ir.node(op_type, [erf])
        node.outputs[0].name, node.outputs[0].dtype = f"{op_type}.out", ir.DataType.FLOAT
        branches.append(ir.Graph([], node.outputs, nodes=[node], name=op_type))
    flag = ir.Value(name="flag", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    model.graph.inputs.append(flag)
    choice = ir.node("If", [flag], {"then_branch": branches[0], "else_branch": branches[1]}, name="choice")
    choice.outputs[0].name, choice.outputs[0].dtype = "z", ir.DataType.FLOAT
    model.graph.append(choice)
    model.graph.outputs.append(choice.outputs[0])
    save_graph(model, tmp_path / "plain.onnx")
    prepare(tmp_path / "plain.onnx", tmp_path / "ready.onnx")
    made, counts = fuse_operators(tmp_path / "ready.onnx", layer_norms=True)
    save_graph(made, tmp_path / "fused.onnx")
    feed = {"x": X, "flag": np.array(True)}
    ort.InferenceSession(tmp_path / "fused.onnx", providers=["CPUExecutionProvider"]).run(None, feed)
    return counts


@pytest.mark.parametrize("keepdims", [{}, {"keepdims": 1}])
def test_lp_norm(keepdims, tmp_path):
    nodes = [
        N("ReduceL2", "x", "r", "r", {"axes": [-1], **keepdims}),
        N("Clip", "r tiny", "c", "c"),
        N("Shape", "x", "shape", "shape"),
        N("Expand", "c shape", "w", "w"),
        N("Div", "x w", "y", "div"),
    ]
    kinds, counts = fused(tmp_path, nodes, {"tiny": np.array(1e-12, np.float32)})
    assert (kinds, counts) == (["LpNormalization"], {"LpNormalization": 1})


@pytest.mark.parametrize("fixed", [True, False])
def test_space_to_depth(fixed, tmp_path):
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    shapes = {"s1": [1, 3, 4, 2, 4, 2], "s2": [1, 3, 16, 4], "s3": [1, 3, 4, 4, 4], "s4": [1, 12, 4, 4]}
    nodes = [
        N("Reshape", "x s1", "a", "a"), N("Transpose", "a", "b", "b", {"perm": [0, 1, 2, 4, 3, 5]}),
        N("Reshape", "b s2", "c", "c"), N("Transpose", "c", "d", "d", {"perm": [0, 1, 3, 2]}),
        N("Reshape", "d s3", "e", "e"), N("Transpose", "e", "f", "f", {"perm": [0, 2, 1, 3, 4]}),
        N("Reshape", "f s4", "y", "y"),
    ]  # fmt: skip
    weights = {k: np.array(v, np.int64) for k, v in shapes.items()}
    kinds, counts = fused(tmp_path, nodes, weights, fixed=fixed, sizes=shapes["s4"], x=x)
    assert counts == ({"SpaceToDepth": 1} if fixed else {}) and len(kinds) == (1 if fixed else 7)
