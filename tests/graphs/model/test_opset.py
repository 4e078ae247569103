from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import small_graphs
from onnx_graphs import N, graph_model
from quantcli.errors import InputError
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.model.opset import Conversion, convert_opset, prove_conversion
from quantcli.graphs.walk.matrices import prepare

NOWHERE = Path("no folder")


def parsed(opset, body, ir_version=7):
    """A model in onnx's own notation: x [N, 8] to y."""
    text = (
        f'<ir_version: {ir_version}, opset_import: ["": {opset}, "com.microsoft": 1]>'
        f" g (float[N, 8] x, bool c) => (float[N, 8] y) {body}"
    )
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("wanted", [13, 21, 25])
@pytest.mark.parametrize("in_constants", [False, True])
def test_the_function_the_names_and_the_weights_stay(in_constants, wanted, tmp_path):
    path = small_graphs.cnn(tmp_path / "float.onnx", opset=11, in_constants=in_constants)
    model = open_graph(path)
    prepare(model)
    model.graph.outputs[0].shape = ir.Shape(["n", 10])
    model.graph[1].metadata_props["of"] = "a node"
    found = convert_opset(model, wanted)
    proof = prove_conversion(model, found, tmp_path)
    assert (proof.before, proof.after) == (11, wanted) and proof.difference < 1e-5
    assert (model.opset_imports[""], found.opset_imports[""]) == (11, wanted)
    assert [v.name for v in found.graph.inputs] == ["x"] and [v.name for v in found.graph.outputs] == ["y"]
    before, after = ([n.name for n in m.graph if n.op_type != "Constant"] for m in (model, found))
    assert before == after
    assert found.metadata_props == model.metadata_props != {}
    assert found.graph[1].metadata_props == {"of": "a node"}
    for name, value in model.graph.initializers.items():
        assert found.graph.initializers[name].const_value is value.const_value  # still where they lie, unread
    save_graph(found, tmp_path / "later.onnx")
    onnx.checker.check_model(str(tmp_path / "later.onnx"), full_check=True)


def test_weights_are_not_read(tmp_path):
    """However large: here their file is not even there."""
    shape = ir.Shape((50_000, 50_000))
    model = graph_model([N("MatMul", "x w", "y", "m")], {"w": np.zeros((2, 2), np.float32)}, opset=11)
    value = model.graph.initializers["w"]
    value.const_value = ir.ExternalTensor("huge.data", 0, 4 * 50_000**2, ir.DataType.FLOAT, shape=shape, name="w")
    value.shape = shape
    found = convert_opset(model, 21)
    assert found.graph.initializers["w"].const_value is value.const_value
    assert "not compared" in str(prove_conversion(model, found, tmp_path))


@pytest.mark.parametrize(
    "body",
    [
        "{ y = If (c)"
        " <then_branch = t () => (float[N, 8] a) { b = Unsqueeze <axes = [1]> (x) a = Squeeze <axes = [1]> (b) },"
        " else_branch = e () => (float[N, 8] d) { d = Softmax <axis = 0> (x) }> }",
        "{ h = com.microsoft.Gelu (x) s = ReduceSum <axes = [1]> (h) y = Add (h, s) }",
        "<float[8] g = {1, 2, 3, 4, 5, 6, 7, 8}> { y = SimplifiedLayerNormalization <axis = -1> (x, g) }",
    ],
    ids=["subgraphs", "com.microsoft", "onnxruntime's own in the standard's domain"],
)
def test_what_is_inside_or_not_the_standards(body):
    model = parsed(11, body)
    found = convert_opset(model, 21)
    assert prove_conversion(model, found, NOWHERE).difference < 1e-6
    assert {n.domain for n in found.graph.all_nodes()} == {n.domain for n in model.graph.all_nodes()}
    assert set(found.opset_imports) == {"", "com.microsoft"}
    assert found.ir_version == 10


def test_a_later_file_format_stays():
    assert convert_opset(parsed(11, "{ y = Relu (x) }", ir_version=9), 13).ir_version == 9


def test_an_operator_that_cannot_be_converted():
    model = parsed(7, "{ y = BatchNormalization <spatial = 0> (x, x, x, x, x) }")
    with pytest.raises(
        InputError,
        match=r"^opset 7 cannot be converted to 21: BatchNormalization: Attribute spatial must have value 1$",
    ) as e:
        convert_opset(model, 21)
    assert e.value.hint == "export the model with opset 21 or later"


def test_graphs_that_compute_something_else():
    one = parsed(11, "{ y = Softmax <axis = 0> (x) }")
    other = parsed(13, "{ y = Softmax <axis = 0> (x) }")  # the same words, another meaning
    with pytest.raises(InputError, match=r"opset 13 computes something else than the graph's 11: .* off by"):
        prove_conversion(one, other, NOWHERE)
    with pytest.raises(InputError, match=r"opset 11 cannot be converted to 13: the other graph does not run"):
        prove_conversion(one, parsed(13, "{ y = Squeeze (x, x) }"), NOWHERE)


def test_what_cannot_be_compared_is_said():
    model = parsed(11, "<int64[2] s = {3, 7}> { y = Reshape (x, s) }")  # 21 of so many rows of 8: never
    proof = prove_conversion(model, convert_opset(model, 21), NOWHERE)
    assert proof.difference is None and "no inputs could be made up for it" in proof.unproven
    assert str(Conversion(11, 21, 0.0)).endswith("from opset 11 to 21; its outputs are the same")
