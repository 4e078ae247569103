import numpy as np
import onnx_ir as ir
import pytest
import torch

from quantcli.graphs.checking.read_back import verify_weights
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.weights.accuracy_level import change_accuracy_level, count_by_bits
from quantcli.graphs.weights.checkpoint_rows import Rows
from quantcli.graphs.weights.matmul_nbits import Rewriter
from quantcli.scheme import Scheme
from quantcli.tensors.affine import minmax_grid, round_to_grid

EXPECTED = {"a": 8, "b": 4, "c": 4}


def matrices():
    random = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(n, 48, generator=random) for n in EXPECTED.values())
    grids = {"a": (a, Scheme(4, 16)), "b": (b, Scheme(3, 16))}
    quantized = {n: round_to_grid(w, *minmax_grid(w, s), s) for n, (w, s) in grids.items()}
    return {**quantized, "c": c}


def write(folder, found):
    """One product with a, b and c joined, rewritten."""
    weight = ir.Value(name="w.weight", const_value=ir.Tensor(np.zeros((48, 16), np.float32), name="w.weight"))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("n", 48)))
    node = ir.node("MatMul", [x, weight], name="/w")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20}, name="g")
    rows = torch.cat([Rows.whole(n, count, 48) for n, count in EXPECTED.items()]).T
    placements = Rewriter(graph, {"w.weight": rows}, found.__getitem__, 0).run()
    graph.sort()
    save_graph(ir.Model(graph, ir_version=10), folder / "model.onnx")
    return folder / "model.onnx", placements


def test_joined_weights_of_several_kinds_run(tmp_path):
    import onnxruntime

    found = matrices()
    path, placements = write(tmp_path, found)
    verify_weights(path, placements, found.__getitem__, EXPECTED)
    assert count_by_bits(path) == {"4": 1, "float": 1}  # 3 bits lie in 4-bit containers beside the 4-bit rows
    x = np.random.default_rng(1).standard_normal((5, 48)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    whole = torch.cat([found["a"].dequantize(), found["b"].dequantize(), found["c"]]).numpy()
    np.testing.assert_allclose(y, x @ whole.T, atol=1e-4)


@pytest.mark.parametrize("name", ["w.0.qweight", "w.0.scales", "w.0.zeros", "w.1.weight"])
def test_a_changed_byte_is_found(name, tmp_path):
    found = matrices()
    path, placements = write(tmp_path, found)
    model = open_graph(path)
    value = model.graph.initializers[name]
    array = value.const_value.numpy().copy()
    array.reshape(-1)[3] = array.reshape(-1)[3] * 2 + 1
    value.const_value = ir.Tensor(array, name=name)
    (tmp_path / "changed").mkdir()
    save_graph(model, tmp_path / "changed" / "model.onnx")
    with pytest.raises(AssertionError, match="differs from the checkpoint"):
        verify_weights(tmp_path / "changed" / "model.onnx", placements, found.__getitem__, EXPECTED)


def test_missing_and_repeated_matrices_are_found(tmp_path):
    found = matrices()
    path, placements = write(tmp_path, found)
    with pytest.raises(AssertionError, match="c is not whole"):
        verify_weights(path, placements[:-1], found.__getitem__, EXPECTED)
    with pytest.raises(AssertionError, match="exactly once"):
        verify_weights(path, [*placements, placements[-1]], found.__getitem__, EXPECTED)
    with pytest.raises(AssertionError, match="unknown origin"):
        verify_weights(path, placements[1:], found.__getitem__, {"c": 4})


def test_accuracy_level_changes_in_the_file(tmp_path):
    path, _ = write(tmp_path, matrices())
    assert change_accuracy_level(path, 4) == 1
    levels = [n.attributes["accuracy_level"].as_int() for n in open_graph(path).graph if n.op_type == "MatMulNBits"]
    assert levels == [4]
