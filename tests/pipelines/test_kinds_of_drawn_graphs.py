"""Kinds of graphs that test_every_graph.py found at fault, each as small as it can be."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from every_method import METHODS, options_of
from onnx_graphs import N, graph_model
from quantcli.graphs.checking.side_by_side import MOST_DB, decibels
from quantcli.pipelines import quantize

RANDOM = np.random.default_rng(0)


def made(folder, method, nodes, weights, *, shape=(32,), external=False):
    """The graph that a method makes of these nodes, and its result."""
    model = graph_model(nodes, weights, opset=17, ranks={"x": 1 + len(shape), "y": 3 if len(shape) > 1 else 2})
    path = folder / "model.onnx"
    if external:
        onnx.save(ir.to_proto(model), path, save_as_external_data=True, location="model.data", size_threshold=0)
    else:
        ir.save(model, path)
    np.savez(folder / "samples.npz", x=RANDOM.standard_normal((16, *shape), np.float32))
    result = quantize.run(options_of(METHODS[method], path, folder / "Q", 2))
    return ir.load(folder / "Q" / "model" / "model.onnx").graph, result


def normal(*shape):
    return RANDOM.standard_normal(shape, np.float32) / np.float32(shape[0] ** 0.5)


def test_a_tensor_that_is_rounded_twice_has_nodes_of_two_names(tmp_path):
    """An operator that stands between conversions and one that computes with integers read the same tensor."""
    nodes = [
        N("ConvTranspose", "x w", "a", "up"),
        N("Add", "x c", "b", "add"),
        N("Concat", "a b", "y", "join", {"axis": 2}),
    ]
    weights = {"w": normal(32, 32, 3), "c": normal(32, 1)}
    graph, result = made(tmp_path, "static, qoperator", nodes, weights, shape=(32, 8))
    names = [node.name for node in graph]
    assert len(set(names)) == len(names) and not result.kept


@pytest.mark.parametrize(("signal", "noise"), [(1e-300, 1e300), (1.0, float("inf")), (1.0, float("nan"))])
def test_a_ratio_that_no_float_holds_is_nothing_of_the_signal(signal, noise):
    assert decibels(signal, noise) == -MOST_DB


@pytest.mark.parametrize("method", ["rtn, 8 bits", "rtn, 4 bits, qdq"])
def test_codes_that_a_graph_brings_along_stay(method, tmp_path):
    """Those of a bias are no weights of ours, with a zero point or without."""
    nodes = [
        N("MatMul", "x w", "a", "product"),
        N("DequantizeLinear", "codes scale", "bias", "stored"),
        N("Add", "a bias", "y", "add"),
    ]
    codes = {"codes": np.arange(48, dtype=np.int8), "scale": np.float32(0.01)}
    graph, result = made(tmp_path, method, nodes, {"w": normal(32, 48), **codes})
    kept = [
        v.const_value.numpy() for v in graph.initializers.values() if v.shape == (48,) and v.dtype == ir.DataType.INT8
    ]
    assert any(np.array_equal(array, codes["codes"]) for array in kept)
    assert result.outputs.outputs[0].sqnr_db > 15


def test_a_graph_with_its_shapes_in_the_data_file_is_compared(tmp_path):
    nodes = [N("Reshape", "x shape", "a", "reshape"), N("MatMul", "a w", "y", "product")]
    weights = {"w": normal(32, 32), "shape": np.array([-1, 32], np.int64)}
    _, result = made(tmp_path, "static", nodes, weights, external=True)
    assert result.outputs is not None and result.outputs.outputs[0].sqnr_db > 25


def test_an_empty_tensor_in_the_data_file(tmp_path):
    nodes = [N("MatMul", "x w", "a", "product"), N("Concat", "a none", "y", "join", {"axis": 0})]
    weights = {"w": normal(32, 32), "none": np.zeros((0, 32), np.float32)}
    _, result = made(tmp_path, "static", nodes, weights, external=True)
    assert result.outputs.outputs[0].sqnr_db > 25


def test_a_product_with_a_vector_takes_no_factors(tmp_path):
    """It leaves no channels: what reads it is smoothed by a Mul or not at all."""
    nodes = [
        N("MatMul", "x v", "a", "vector"),
        N("MatMul", "a w", "b", "product"),
        N("Unsqueeze", "b axis", "y", "row"),
    ]
    weights = {"v": normal(32), "w": normal(8, 48), "axis": np.array([1], np.int64)}
    _, result = made(tmp_path, "smoothquant,static", nodes, weights, shape=(8, 32))
    assert result.outputs.outputs[0].sqnr_db > 20


@pytest.mark.parametrize("method", METHODS)
def test_what_has_nothing_to_quantize_says_what_it_has(method, tmp_path):
    from quantcli.errors import InputError, UsageError

    with pytest.raises((InputError, UsageError), match=r"Erf|MatMul or Gemm"):
        made(tmp_path, method, [N("Erf", "x", "y", "erf")], {})
