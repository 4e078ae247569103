import numpy as np
import onnx_ir as ir
import pytest

from onnx_graphs import N, graph_model
from quantcli.errors import InputError
from quantcli.graphs.walk.matrices import Selection, find_targets, prepare, read_matrix

RANDOM = np.random.default_rng(0)
W = {
    "a": RANDOM.standard_normal((40, 24)).astype(np.float32),  # [K, N]
    "b": RANDOM.standard_normal((12, 24)).astype(np.float32),  # [N, K] of a Gemm with transB
    "c": RANDOM.standard_normal((30, 12)).astype(np.float32),  # [N, K] behind a Transpose, and a table
}
CHAIN = [
    N("MatMul", "x a", "h", "first"),
    N("Gemm", "h b", "g", "second", {"transB": 1}),
    N("Transpose", "c", "ct", "turn", {"perm": [1, 0]}),
    N("MatMul", "g ct", "y", "head"),
    N("Gather", "c ids", "e", "table"),
]


def found(model, **selection):
    prepare(model)
    return find_targets(model.graph, Selection(**{"op_types": ("MatMul", "Gemm", "Gather")} | selection))


def test_matrices_are_found_however_they_are_stored():
    model = graph_model(CHAIN, W, "x ids", "y e")
    targets, kept = found(model)
    assert [(t.name, t.rows, t.columns, t.transposed, t.inputs) for t in targets] == [
        ("a", 24, 40, True, ("x",)),
        ("b", 12, 24, False, ("h",)),
        ("c", 30, 12, False, ("g",)),
    ]
    assert kept == {}
    assert [u.node.name for u in targets[2].uses] == ["head", "table"]
    for target in targets:
        wanted = W[target.name].T if target.transposed else W[target.name]
        np.testing.assert_array_equal(read_matrix(model.graph, target), wanted)


def test_a_shared_weight_is_one_target_with_both_inputs():
    nodes = [N("MatMul", "x a", "y", "one"), N("MatMul", "x2 a", "z", "two")]
    targets, _ = found(graph_model(nodes, {"a": W["a"]}, "x x2", "y z"))
    assert [(t.name, t.inputs) for t in targets] == [("a", ("x", "x2"))]


def test_constants_and_initializers_among_the_inputs_count():
    nodes = [
        N("Constant", "", "k", "constant", {"value": ir.Tensor(W["a"], name="k")}),
        N("MatMul", "x k", "h", "one"),
        N("Gemm", "h b", "y", "two", {"transB": 1}),
    ]
    model = graph_model(nodes, {"b": W["b"]}, listed="b")
    targets, _ = found(model)
    assert [(t.rows, t.columns) for t in targets] == [(24, 40), (12, 24)]
    assert [v.name for v in model.graph.inputs] == ["x"]


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ({"op_types": ("MatMul",)}, ["a"]),  # c is a table too
        ({"include": ("first",)}, ["a"]),
        ({"include": ("^(first|second)$",)}, ["a", "b"]),
        ({"exclude": ("second",)}, ["a", "c"]),
        ({"last_product": False}, ["a", "b"]),
    ],
)
def test_selection(selection, names):
    targets, kept = found(graph_model(CHAIN, W, "x ids", "y e"), **selection)
    assert [t.name for t in targets] == names
    assert set(kept) == set(W) - set(names)
    assert all(kept.values())


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([N("MatMul", "a x", "y", "n")], "input 0 of the MatMul 'n'"),
        ([N("Gemm", "x a", "y", "n", {"transA": 1})], "the Gemm 'n' transposes its input"),
        ([N("MatMul", "x a", "h", "n"), N("Gemm", "h a", "y", "m", {"transB": 1})], "as it is and transposed"),
        ([N("MatMul", "x a", "h", "n"), N("Add", "h a", "y", "m")], "input 1 of the Add 'm'"),
        ([N("Gather", "a ids", "y", "n", {"axis": 1})], "input 0 of the Gather 'n'"),
    ],
)
def test_what_stays_float_has_a_reason(nodes, reason):
    targets, kept = found(graph_model(nodes, {"a": W["a"]}, "x ids"))
    assert targets == []
    assert reason in kept["a"]


def test_batched_and_double_weights_stay_float():
    weights = {"s": np.zeros((2, 4, 3), np.float32), "d": np.zeros((4, 3))}
    _, kept = found(graph_model([N("MatMul", "x s", "y", "s"), N("MatMul", "x d", "z", "d")], weights, outputs="y z"))
    assert "3 axes" in kept["s"]
    assert "DOUBLE" in kept["d"]


def test_weights_that_bodies_read():
    model = graph_model([N("MatMul", "x a", "y", "outside")], {"a": W["a"], "cond": np.array(True)})
    values = model.graph.initializers
    inner = [ir.node("MatMul", [model.graph.inputs[0], values["a"]], name=f"inside{i}") for i in range(2)]
    branches = [ir.Graph([], n.outputs, nodes=[n], name=f"branch{i}") for i, n in enumerate(inner)]
    attributes = {"then_branch": branches[0], "else_branch": branches[1]}
    model.graph.append(ir.node("If", [values["cond"]], attributes, name="if"))
    (target,), kept = found(model)
    assert {use.node.name for use in target.uses} == {"outside", "inside0", "inside1"} and not kept
    assert {node.name for node in target.inside} == {"inside0", "inside1"}
    assert target.inputs == ("x",)  # bodies have no statistics
    assert found(model, exclude=("inside0",)) == ([], {"a": "excluded"})


def test_bad_graphs():
    nodes = [N("MatMul", "x a", "y", "n")]
    with pytest.raises(InputError, match="opset 6"):
        prepare(graph_model(nodes, {"a": W["a"]}, opset=6))
    quantized = [N("DequantizeLinear", "q s", "w", "dq"), N("MatMul", "x w", "y", "n")]
    said = prepare(graph_model(quantized, {"q": np.zeros((4, 3), np.int8), "s": np.ones((), np.float32)}))
    assert said == ["q is stored as codes, with a DequantizeLinear: it is quantized a second time"]
    quantized = [
        N("QuantizeLinear", "x s", "q", "q"),
        N("DequantizeLinear", "q s", "x8", "dq"),
        N("MatMul", "x8 a", "y", "n"),
    ]
    with pytest.raises(InputError, match="'dq' is a DequantizeLinear"):
        prepare(graph_model(quantized, {"a": W["a"], "s": np.ones((), np.float32)}))
    holed = W["a"].copy()
    holed[3, 4] = np.nan
    model = graph_model(nodes, {"a": holed})
    (target,), _ = found(model)
    with pytest.raises(InputError, match="'a' holds NaN"):
        read_matrix(model.graph, target)
