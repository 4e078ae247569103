import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from onnx_graphs import N, graph_model
from quantcli.errors import UsageError
from quantcli.graphs.files import open_graph, save_graph
from quantcli.graphs.rewrite import refuse_opset, replace_matrices
from quantcli.graphs.verify import verify_weights
from quantcli.graphs.walk import Selection, find_targets, prepare, read_matrix
from quantcli.scheme import Scheme
from quantcli.tensors.affine import minmax_grid, round_to_grid

RANDOM = np.random.default_rng(0)
K, HIDDEN, OUT = 40, 24, 7
W = {
    "a": RANDOM.standard_normal((K, HIDDEN)).astype(np.float32),
    "b": RANDOM.standard_normal((HIDDEN, HIDDEN)).astype(np.float32),
    "bias": RANDOM.standard_normal(HIDDEN).astype(np.float32),
    "c": RANDOM.standard_normal((OUT, HIDDEN)).astype(np.float32),
}
NODES = [
    N("MatMul", "x a", "h", "first"),
    N("Gemm", "h b bias", "g", "second", {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    N("Relu", "g", "r", "relu"),
    N("Gemm", "r b", "g2", "third", {"transB": 1}),  # the second's weight again
    N("Transpose", "c", "ct", "turn", {"perm": [1, 0]}),
    N("MatMul", "g2 ct", "y", "head"),
    N("Gather", "c ids", "e", "table"),
]
FEED = {"x": RANDOM.standard_normal((5, K)).astype(np.float32), "ids": np.array([[0, 3, 6, 2]])}
TYPES = {np.float32: ir.DataType.FLOAT, np.float16: ir.DataType.FLOAT16}


def quantized(matrix, scheme):
    return round_to_grid(matrix, *minmax_grid(matrix, scheme), scheme)


def write(path, scheme, encoding, opset=21, dtype=np.float32, change=lambda tensor: tensor):
    """The graph rewritten, its codes, and the float graph that holds their dequantized values."""
    path.mkdir(exist_ok=True)
    weights = {name: array.astype(dtype) for name, array in W.items()}
    model, plain = (
        graph_model(NODES, weights, "x ids", "y e", opset=opset, dtype=TYPES[dtype], ranks={"e": 3}) for _ in range(2)
    )
    prepare(model)
    targets, _ = find_targets(model.graph, Selection(op_types=("MatMul", "Gemm", "Gather")))
    codes = {t.name: change(quantized(read_matrix(model.graph, t), scheme)) for t in targets}
    for target in targets:
        values = codes[target.name].dequantize().numpy().astype(dtype)
        value = plain.graph.initializers[target.name]
        value.const_value = ir.Tensor(np.ascontiguousarray(values.T if target.transposed else values), name=target.name)
    placements = replace_matrices(model, targets, codes.__getitem__, encoding)
    save_graph(model, path / "model.onnx")
    save_graph(plain, path / "plain.onnx")
    verify_weights(path / "model.onnx", placements, codes.__getitem__, {t.name: t.rows for t in targets})
    onnx.checker.check_model(str(path / "model.onnx"))
    return path / "model.onnx", path / "plain.onnx"


def run(path, dtype=np.float32):
    settings = onnxruntime.SessionOptions()
    # onnxruntime fuses DequantizeLinear and MatMul to a MatMulNBits of accuracy level 4, int8 activations
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return session.run(["y", "e"], {"x": FEED["x"].astype(dtype), "ids": FEED["ids"]})


@pytest.mark.parametrize("encoding", ["nbits", "qdq"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 16), (4, 16), (4, 24), (4, 32), (5, 16), (8, -1)])
def test_the_graph_computes_with_exactly_the_codes(bits, group_size, symmetric, encoding, tmp_path):
    opset = 25 if encoding == "qdq" and bits == 2 else 21
    path, plain = write(tmp_path / "m", Scheme(bits, group_size, symmetric), encoding, opset)
    for found, wanted in zip(run(path), run(plain), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("encoding", ["nbits", "qdq"])
def test_a_shared_weight_stands_once_and_no_float_is_left(encoding, tmp_path):
    path, _ = write(tmp_path, Scheme(4, 16), encoding)
    graph = open_graph(path).graph
    assert [v.name for v in graph.inputs] == ["x", "ids"]
    assert [v.name for v in graph.outputs] == ["y", "e"]
    read = {str(v.name) for node in graph for v in node.inputs if v is not None}
    assert set(graph.initializers) <= read
    assert sum(name.endswith(".qweight") for name in graph.initializers) == 3
    assert not set(graph.initializers) & {"a", "b", "c"}
    names = [n.name for n in graph]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("encoding", ["nbits", "qdq"])
def test_float16_graphs_stay_float16(encoding, tmp_path):
    path, plain = write(tmp_path, Scheme(4, 16), encoding, dtype=np.float16)
    for found, wanted in zip(run(path, np.float16), run(plain, np.float16), strict=True):
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, wanted, atol=0.01 * np.abs(wanted).max())


@pytest.mark.parametrize("encoding", ["nbits", "qdq"])
def test_permuted_groups(encoding, tmp_path):
    """Groups that are no runs of columns, as act-order `desc_act` makes them."""

    def permute(tensor):
        from dataclasses import replace

        order = torch.randperm(tensor.shape[1], generator=torch.Generator().manual_seed(1))
        return replace(tensor, codes=tensor.codes[:, order], group=tensor.group[order])

    path, plain = write(tmp_path, Scheme(4, 16), encoding, change=permute)
    for found, wanted in zip(run(path), run(plain), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_old_opsets_have_no_blocks():
    graph = graph_model(NODES, W, "x ids", "y e", opset=17).graph
    refuse_opset(graph, "nbits", 4)
    with pytest.raises(UsageError, match="at 3 bits needs opset 21, the graph has 17"):
        refuse_opset(graph, "qdq", 3)
