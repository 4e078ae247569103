"""LLM.int8() on graphs: what is written computes the literal decomposition, whatever shape products have."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto as T
from onnx import helper as h  # noqa: TID251
from onnx import numpy_helper as nh

from quantcli.errors import InputError, UsageError
from quantcli.options import GraphOptions, QuantizeOptions
from quantcli.pipelines import inspect, quantize

K, N, P = 40, 24, 16
LOUD = (5, 17)


def vectors(x):
    """Codes and scale of each vector of the last axis, number by number in float32."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.finfo(np.float32).tiny)
    return np.rint(x / scale), scale


def literal(x, weight, outliers):
    others = [k for k in range(x.shape[-1]) if k not in outliers]
    codes, scale = vectors(x[..., others])
    columns = weight[others]
    largest = np.abs(columns).max(0)
    stored = np.rint(columns * np.divide(127, largest, where=largest > 0, out=np.zeros_like(largest)))
    return codes @ stored * scale * (largest / 127) + x[..., sorted(outliers)] @ weight[sorted(outliers)]


def write(path, opset=17, loud=LOUD, size=0.1, **gemm):
    """MatMul, Relu, and a Gemm of whatever attributes; the MatMul's product is an output too."""
    rng = np.random.default_rng(0)
    first = (rng.standard_normal((K, N)) * size).astype(np.float32)
    first[list(loud)] /= 20
    second = (rng.standard_normal((P, N) if gemm.get("transB") else (N, P)) * 0.1).astype(np.float32)
    bias = rng.standard_normal(P).astype(np.float32)
    nodes = [
        h.make_node("MatMul", ["x", "first"], ["a"], "one"),
        h.make_node("Relu", ["a"], ["r"], "relu"),
        h.make_node("Gemm", ["r", "second", "bias"], ["y"], "two", **gemm),
    ]
    tensors = [nh.from_array(a, n) for a, n in ((first, "first"), (second, "second"), (bias, "bias"))]
    outputs = [h.make_tensor_value_info("y", T.FLOAT, ["n", P]), h.make_tensor_value_info("a", T.FLOAT, ["n", N])]
    graph = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", T.FLOAT, ["n", K])], outputs, tensors)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)])
    model.ir_version = 9
    onnx.save(model, path)
    return first, second.T if gemm.get("transB") else second, bias


def samples(folder, loud=LOUD, count=4):
    folder.mkdir()
    rng = np.random.default_rng(1)
    found = []
    for number in range(count):
        x = rng.uniform(-2, 2, (6, K)).astype(np.float32)
        x[:, list(loud)] *= 20
        np.savez(folder / f"{number}.npz", x=x)
        found.append(x)
    return found


def run(model, output, feeds, **values):
    graph = GraphOptions(calibration_inputs=feeds, **values.pop("graph", {}))
    return quantize.run(QuantizeOptions(str(model), output, algorithm="llm-int8", graph=graph, **values))


@pytest.mark.parametrize(
    ("opset", "gemm"),
    [(17, {"transB": 1}), (13, {}), (18, {"alpha": 0.5, "beta": 2.0}), (21, {"alpha": 0.5, "transB": 1})],
)
def test_it_computes_the_literal_decomposition(tmp_path, opset, gemm):
    first, second, bias = write(tmp_path / "m.onnx", opset, **gemm)
    feeds = samples(tmp_path / "x")
    result = run(tmp_path / "m.onnx", tmp_path / "q", tmp_path / "x")
    assert result.quantized == ("one", "two") and not result.kept
    session = onnxruntime.InferenceSession(tmp_path / "q" / "model" / "m.onnx")
    outliers = {report.linears[0]: report.channels for report in result.outliers}
    assert sorted(outliers["one"]) == sorted(LOUD)
    for x in [*feeds, np.zeros((2, K), np.float32)]:
        a = literal(x, first, LOUD)
        y, found = session.run(["y", "a"], {"x": x})
        np.testing.assert_allclose(found, a, rtol=1e-4, atol=1e-4)
        weight = second * np.float32(gemm.get("alpha", 1))
        expected = literal(np.maximum(found, 0), weight, outliers["two"]) + bias * np.float32(gemm.get("beta", 1))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    kept = json.loads((tmp_path / "q" / "report.json").read_text())["outliers"]
    assert [o["channels"] for o in kept] == [o.channels for o in result.outliers]
    assert inspect.run(tmp_path / "q").operators["MatMulInteger"] == 2


def test_outliers_are_what_it_is_about(tmp_path):
    """Without them set apart more is lost."""
    write(tmp_path / "m.onnx")
    samples(tmp_path / "x")
    apart = run(tmp_path / "m.onnx", tmp_path / "a", tmp_path / "x")
    plain = run(tmp_path / "m.onnx", tmp_path / "b", tmp_path / "x", settings={"threshold": "0"})
    assert not any(report.outlier_columns for report in plain.outliers)
    assert sqnr_db(apart) > sqnr_db(plain) + 6


def sqnr_db(result):
    return min(found.sqnr_db for found in result.outputs.outputs)


def test_nodes_and_channels_that_stay(tmp_path):
    write(tmp_path / "m.onnx")
    samples(tmp_path / "x")
    result = run(tmp_path / "m.onnx", tmp_path / "q", tmp_path / "x", graph={"nodes_exclude": ("two",)})
    assert result.quantized == ("one",) and "two" in result.kept
    write(tmp_path / "n.onnx", loud=(), size=0.01)
    samples(tmp_path / "z", loud=range(K))
    result = run(tmp_path / "n.onnx", tmp_path / "r", tmp_path / "z", settings={"threshold": "20"})
    assert result.kept["one"] == "all channels of its input are outliers"
    with pytest.raises(InputError, match="no node is left to quantize: all channels"):
        run(tmp_path / "n.onnx", tmp_path / "s", tmp_path / "z", settings={"threshold": "1e-9"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4}, "llm-int8 makes 8 bits, not 4"),
        ({"group_size": 32}, "group-size has no effect with llm-int8"),
        ({"graph": {"op_types": ("Conv",)}}, "llm-int8 has no --op-types"),
        ({"graph": {"calibration_cache": "ranges.json"}}, "llm-int8 measures no ranges"),
    ],
)
def test_what_is_refused(tmp_path, values, message):
    write(tmp_path / "m.onnx")
    samples(tmp_path / "x")
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "m.onnx", tmp_path / "q", tmp_path / "x", **values)
