import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import small_graphs
from quantcli.errors import InputError
from quantcli.graphs.rewrite.prepare import prepare


def run(path, x):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def images(count=5):
    return np.random.default_rng(9).normal(size=(count, 3, 12, 12)).astype(np.float32)


@pytest.mark.parametrize("in_constants", [False, True])
@pytest.mark.parametrize("opset", [11, 17])
def test_the_function_stays(opset, in_constants, tmp_path):
    source = small_graphs.cnn(tmp_path / "float.onnx", opset=opset, in_constants=in_constants)
    found = prepare(source, tmp_path / "ready.onnx")
    if opset < 13:
        assert (found.conversion.before, found.conversion.after) == (opset, 13)
        assert found.conversion.difference < 1e-5
    else:
        assert found.conversion is None
    assert found.folded == 1 and not found.left and not found.untyped
    assert found.lifted == (9 if in_constants else 0)
    graph = ir.load(tmp_path / "ready.onnx")
    assert not {"Constant", "BatchNormalization"} & {n.op_type for n in graph.graph}
    assert graph.metadata_props["made_by"] == "test"
    assert all(v.dtype is not None and v.shape is not None for n in graph.graph for v in n.outputs)
    assert [v.name for v in graph.graph.outputs] == ["y"]
    onnx.checker.check_model(str(tmp_path / "ready.onnx"), full_check=True)
    np.testing.assert_allclose(run(tmp_path / "ready.onnx", images()), run(source, images()), atol=1e-5)


def test_weights_stay_beside_the_graph(tmp_path):
    source = small_graphs.cnn(tmp_path / "float.onnx", opset=11)
    prepare(source, tmp_path / "ready.onnx")
    proto = onnx.load(tmp_path / "ready.onnx", load_external_data=False)
    large = [t for t in proto.graph.initializer if np.prod(t.dims) > 256]
    assert large and all(t.data_location == onnx.TensorProto.EXTERNAL for t in large)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "float.onnx", "float.onnx.data", "ready.onnx", "ready.onnx.data",
    ]  # fmt: skip


def test_a_batch_norm_that_cannot_go_is_named(tmp_path):
    b = small_graphs.Builder("n", 4, 6, 6)
    parameters = [b.weight(n, np.full(4, 0.5, np.float32)) for n in ("gamma", "beta", "mean", "var")]
    y = b.node("BatchNormalization", [b.x, *parameters], "n", "first")
    z = b.node("Conv", [y, b.weight("w", np.ones((4, 4, 1, 1), np.float32))], "c", "conv")
    y = b.node("BatchNormalization", [z, *parameters], "m", "second")
    y = b.node("Add", [y, z], "y", "sum")
    found = prepare(b.save(tmp_path / "f.onnx", y), tmp_path / "ready.onnx")
    assert found.folded == 0
    assert found.left == (
        "first: follows an input, not Conv, ConvTranspose or Gemm",
        "second: other nodes use the output of conv too",
    )


@pytest.mark.parametrize("op_type", ["ConvTranspose", "Gemm"])
def test_other_nodes_take_batch_norms_too(op_type, tmp_path):
    r = np.random.default_rng(3)
    shape = (4, 6, 2, 2) if op_type == "ConvTranspose" else (4, 6)
    b = small_graphs.Builder(*(("n", 4, 5, 5) if op_type == "ConvTranspose" else ("n", 4)))
    y = b.node(op_type, [b.x, b.weight("w", r.normal(size=shape).astype(np.float32))], "c", "linear")
    parameters = [b.weight(n, r.uniform(0.5, 2, 6).astype(np.float32)) for n in ("gamma", "beta", "mean", "var")]
    source = b.save(tmp_path / "f.onnx", b.node("BatchNormalization", [y, *parameters], "y", "norm"))
    assert prepare(source, tmp_path / "ready.onnx").folded == 1
    x = r.normal(size=(3, 4, 5, 5)[: 2 if op_type == "Gemm" else 4]).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path / "ready.onnx", x), run(source, x), atol=1e-5)


def test_nodes_without_a_name_or_with_the_same_get_their_own(tmp_path):
    b = small_graphs.Builder("n", 8)
    y = b.x
    for index, name in enumerate(("", "same", "same", "Relu_0")):
        y = b.node("Relu", [y], f"r{index}", name)
    prepare(b.save(tmp_path / "f.onnx", y), tmp_path / "ready.onnx")
    names = [n.name for n in ir.load(tmp_path / "ready.onnx").graph]
    assert len(set(names)) == 4 and all(names) and "Relu_0" in names


def test_types_that_contradict_are_an_error(tmp_path):
    b = small_graphs.Builder("n", 8)
    y = b.node("MatMul", [b.x, b.weight("w", np.ones((9, 4), np.float32))], "y", "up")
    with pytest.raises(InputError, match="types and shapes of ready"):
        prepare(b.save(tmp_path / "f.onnx", y), tmp_path / "ready.onnx")


def test_the_oldest_opsets_are_brought_along(tmp_path):
    b = small_graphs.Builder("n", 8, opset=6)
    done = prepare(b.save(tmp_path / "f.onnx", b.node("Relu", [b.x], "y")), tmp_path / "ready.onnx")
    assert done.conversion is not None and (done.conversion.before, done.conversion.after) == (6, 13)
