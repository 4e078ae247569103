import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from onnx_graphs import N, graph_model
from quantcli.algorithms.rounders import hqq
from quantcli.graphs.checking.read_back import verify_weights
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.walk.matrices import Selection, find_targets, prepare, read_matrix
from quantcli.graphs.weights.replace import needed_opset, replace_matrices
from quantcli.scheme import Scheme
from quantcli.tensors.affine import minmax_grid, round_to_grid
from quantcli.tensors.codebook import round_to_codebook

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
FLOAT_ZEROS = hqq.HqqOptions(zero="float")
TYPES = {np.float32: ir.DataType.FLOAT, np.float16: ir.DataType.FLOAT16}


def matrix(graph, target):
    return torch.from_numpy(read_matrix(graph, target))


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
    codes = {t.name: change(quantized(matrix(model.graph, t), scheme)) for t in targets}
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
@pytest.mark.parametrize(
    ("bits", "group_size"),
    [(1, 16), (2, 16), (3, 16), (4, 16), (4, 24), (4, 32), (5, 16), (6, 16), (7, 32), (8, -1), (8, 16)],
)
def test_the_graph_computes_with_exactly_the_codes(bits, group_size, symmetric, encoding, tmp_path):
    opset = 25 if encoding == "qdq" and bits <= 2 else 21
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


def test_encodings_and_the_opsets_that_have_them():
    assert needed_opset("nbits", [2, 8]) == 0
    assert needed_opset("qdq", [3, 8]) == 21
    assert needed_opset("qdq", [8, 1]) == 25


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_zero_points_may_be_fractions(bits, dtype, tmp_path):
    """In MatMulNBits of up to 4 bits; 40 columns leave a short last block."""
    scheme = Scheme(bits, 16)
    nodes = [n for n in NODES if n.op != "Gather"]
    weights = {name: array.astype(dtype) for name, array in W.items()}
    model, plain = (graph_model(nodes, weights, dtype=TYPES[dtype]) for _ in range(2))
    prepare(model)
    targets, _ = find_targets(model.graph, Selection())
    codes = {t.name: hqq.quantize(matrix(model.graph, t), scheme, FLOAT_ZEROS, None) for t in targets}
    assert all(c.has_float_zeros and bool((c.zero % 1 != 0).any()) for c in codes.values())
    for target in targets:
        values = codes[target.name].dequantize().numpy().astype(dtype)
        value = plain.graph.initializers[target.name]
        value.const_value = ir.Tensor(np.ascontiguousarray(values.T if target.transposed else values), name=target.name)
    placements = replace_matrices(model, targets, codes.__getitem__)
    found, wanted = (run_products(m, tmp_path / f"{i}.onnx", dtype) for i, m in enumerate((model, plain)))
    verify_weights(tmp_path / "0.onnx", placements, codes.__getitem__, {t.name: t.rows for t in targets})
    np.testing.assert_allclose(found, wanted, atol=(1e-4 if dtype == np.float32 else 2e-2) * np.abs(wanted).max())


def run_products(model, path, dtype=np.float32):
    save_graph(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": FEED["x"].astype(dtype)})[0]


@pytest.mark.parametrize("group_size", [16, 32, 48, -1])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codebooks_are_those_of_matmulbnb4(name, group_size, tmp_path):
    """Codes and scales are the rounder's; 96 columns, so that the blocks of 48 are cut."""
    random = np.random.default_rng(3)
    weights = {"a": random.standard_normal((96, 32)), "b": random.standard_normal((7, 32)), "bias": np.ones(7)}
    nodes = [N("MatMul", "x a", "h", "first"), N("Gemm", "h b bias", "y", "second", {"transB": 1, "beta": 0.5})]
    model = graph_model(nodes, {k: v.astype(np.float32) for k, v in weights.items()})
    prepare(model)
    targets, _ = find_targets(model.graph, Selection())
    scheme = Scheme(4, group_size, codebook=name)
    codes = {t.name: round_to_codebook(matrix(model.graph, t), scheme) for t in targets}
    placements = replace_matrices(model, targets, codes.__getitem__)
    x = random.standard_normal((5, 96)).astype(np.float32)
    save_graph(model, tmp_path / "m.onnx")
    verify_weights(tmp_path / "m.onnx", placements, codes.__getitem__, {t.name: t.rows for t in targets})
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": x})
    a, b = (codes[n].dequantize().numpy() for n in "ab")
    np.testing.assert_allclose(found, x @ a.T @ b.T + 0.5, rtol=1e-4, atol=1e-3)
    graph = open_graph(tmp_path / "m.onnx").graph
    bnb4 = [n for n in graph if n.op_type == "MatMulBnb4"]
    assert [n.attributes["block_size"].as_int() for n in bnb4] == {
        16: [16, 16],
        32: [32, 32],
        48: [16, 32],
        -1: [32, 32],
    }[group_size]
    first = graph.initializers["a.qweight"].const_value.numpy()
    flat = codes["a"].codes.numpy().reshape(-1)
    np.testing.assert_array_equal(first, flat[::2] * 16 + flat[1::2])


@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (3, 32), (8, -1)])
def test_kernels_of_conv(bits, group_size, tmp_path):
    """One row per output channel; grouped convolutions too."""
    random = np.random.default_rng(4)
    weights = {"k": random.standard_normal((6, 4, 3, 3)), "d": random.standard_normal((6, 1, 3, 3)), "b": np.ones(6)}
    nodes = [N("Conv", "x k b", "h", "whole"), N("Conv", "h d", "y", "depthwise", {"group": 6})]
    model = graph_model(nodes, {n: v.astype(np.float32) for n, v in weights.items()}, ranks={"x": 4, "y": 4})
    prepare(model)
    targets, _ = find_targets(model.graph, Selection(op_types=("Conv",)))
    assert [(t.name, t.rows, t.columns, t.inputs) for t in targets] == [("k", 6, 36, ()), ("d", 6, 9, ())]
    codes = {t.name: quantized(matrix(model.graph, t), Scheme(bits, group_size)) for t in targets}
    placements = replace_matrices(model, targets, codes.__getitem__, "qdq")
    save_graph(model, tmp_path / "m.onnx")
    verify_weights(tmp_path / "m.onnx", placements, codes.__getitem__, {t.name: t.rows for t in targets})
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    x = random.standard_normal((2, 4, 8, 8)).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": x})
    k, d = (codes[n].dequantize().view(weights[n].shape) for n in "kd")
    wanted = torch.conv2d(torch.conv2d(torch.from_numpy(x), k, torch.ones(6)), d, groups=6)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-3)
