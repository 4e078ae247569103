import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import small_graphs
from onnx_graphs import N, graph_model
from quantcli.errors import UsageError
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.rewrite.channel_last import make_channel_last, turn_feed


def run(path, **feed):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_inputs_and_outputs_are_turned(rank, tmp_path):
    """The second input, which is read twice, and an output that another node reads."""
    nodes = [N("Add", "a b", "s", "add"), N("Mul", "s b", "m", "mul"), N("Relu", "s", "r", "relu")]
    model = graph_model(nodes, {}, "a b", "s m r", ranks=dict.fromkeys("absmr", rank))
    save_graph(model, tmp_path / "first.onnx")
    said = make_channel_last(model, ["b"], ["s", "m"])
    save_graph(model, tmp_path / "last.onnx")
    a, b = np.random.default_rng(0).normal(size=(2, 2, *range(3, 2 + rank))).astype(np.float32)
    before = run(tmp_path / "first.onnx", a=a, b=b)
    after = run(tmp_path / "last.onnx", **turn_feed({"a": a, "b": b}, ["b"]))
    assert list(after) == ["s", "m", "r"]
    for name in ("s", "m"):
        np.testing.assert_array_equal(np.moveaxis(before[name], 1, -1), after[name])
    np.testing.assert_array_equal(before["r"], after["r"])
    found = open_graph(tmp_path / "last.onnx").graph
    turned = [f"b{i}" for i in [0, *range(2, rank), 1]]
    assert [str(d.value) for d in found.inputs[1].shape] == turned
    assert [str(d.value) for d in found.outputs[0].shape] == [f"s{d[1:]}" for d in turned]
    assert len(said) == 3 and f"input b is channel-last now, {'x'.join(turned)}" in said[0]


def test_a_branch_reads_the_input_as_it_was(tmp_path):
    model = graph_model([N("Relu", "x", "y", "relu")], {}, ranks={"x": 3, "y": 3})
    branches = []
    for op_type in ("Abs", "Neg"):
        node = ir.node(op_type, [model.graph.inputs[0]])
        node.outputs[0].name, node.outputs[0].dtype = f"{op_type}.out", ir.DataType.FLOAT
        branches.append(ir.Graph([], node.outputs, nodes=[node], name=op_type))
    flag = ir.Value(name="flag", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    choice = ir.node("If", [flag], {"then_branch": branches[0], "else_branch": branches[1]}, name="choice")
    choice.outputs[0].name, choice.outputs[0].dtype = "z", ir.DataType.FLOAT
    model.graph.inputs.append(flag)
    model.graph.append(choice)
    model.graph.outputs.append(choice.outputs[0])
    make_channel_last(model, ["x"], [])
    save_graph(model, tmp_path / "last.onnx")
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    found = run(tmp_path / "last.onnx", x=np.moveaxis(x, 1, -1), flag=np.array(False))
    np.testing.assert_array_equal(found["z"], -x)


def test_names_stay_their_own(tmp_path):
    nodes = [N("Relu", "x", "x_channel_first", "Transpose_x"), N("Abs", "x_channel_first", "y", "abs")]
    model = graph_model(nodes, {}, ranks={"x": 3, "y": 3})
    make_channel_last(model, ["x"], [])
    save_graph(model, tmp_path / "last.onnx")
    names = [n.name for n in open_graph(tmp_path / "last.onnx").graph]
    assert names == ["Transpose_x_0", "Transpose_x", "abs"]


@pytest.mark.parametrize(("inputs", "outputs", "message"), [
    (["z"], [], r"the graph has no input 'z'.*x"),
    ([], ["x"], r"the graph has no output 'x'"),
    ([], ["y"], r"output y is of unknown shape, channels can be put last from 3 axes on"),
])  # fmt: skip
def test_what_cannot_be_turned_is_refused(inputs, outputs, message, tmp_path):
    model = open_graph(small_graphs.cnn(tmp_path / "cnn.onnx"))
    with pytest.raises(UsageError, match=message):
        make_channel_last(model, inputs, outputs)
    assert [n.op_type for n in model.graph].count("Transpose") == 0
