"""A graph with 3 GiB of weights: external data throughout, and never twice in memory. `make large`; 8 GB of disk."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

pytestmark = [pytest.mark.large, pytest.mark.timeout(3600)]

WIDTH, PRODUCTS = 8192, 12
LAST = PRODUCTS - 1
COPY = 4 * WIDTH * WIDTH * PRODUCTS
ROWS = 8
"""Outputs of a product that are computed again, by numpy."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Products of one input; the last one reads the first one's output. One random matrix, of which each has a line."""
    folder = tmp_path_factory.mktemp("large") / "source"
    folder.mkdir()
    random = np.random.default_rng(0)
    matrix = random.standard_normal((WIDTH, WIDTH), np.float32) / np.float32(WIDTH**0.5)
    with (folder / "net.onnx.data").open("wb") as file:
        for number in range(PRODUCTS):
            matrix[number] = 0.01 * number
            file.write(memoryview(matrix))
    shape, size = ir.Shape((WIDTH, WIDTH)), 4 * WIDTH * WIDTH
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", WIDTH]))
    weights, nodes = [], []
    for number in range(PRODUCTS):
        place = {"shape": shape, "name": f"w{number}", "base_dir": folder}
        stored = ir.ExternalTensor("net.onnx.data", number * size, size, ir.DataType.FLOAT, **place)
        kind = ir.TensorType(ir.DataType.FLOAT)
        weights.append(ir.Value(name=f"w{number}", type=kind, shape=shape, const_value=stored))
        read = nodes[0].outputs[0] if number == LAST else x
        nodes.append(ir.node("MatMul", [read, weights[-1]], name=f"m{number}"))
        output = nodes[-1].outputs[0]
        output.name, output.type, output.shape = f"y{number}", kind, ir.Shape(["n", WIDTH])
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g")
    ir.save(ir.Model(graph, ir_version=10), folder / "net.onnx")
    np.savez(folder.parent / "inputs.npz", x=random.standard_normal((64, WIDTH), np.float32))
    yield folder
    shutil.rmtree(folder.parent)


def quantize(source, *words):
    """In a process of its own: what others have freed hides nothing. The written graph and the report."""
    output = source.parent / "out"
    command = ["-m", "quantcli", "quantize", "-m", source, "-o", output, "--force", *words]
    subprocess.run([sys.executable, *map(str, command)], check=True)
    report = json.loads((output / "report.json").read_text())
    print(*words, f"{report['peak_bytes'] / COPY:.2f} copies, {report['seconds']:.0f} s")
    return output / "model", report


def tensors(model):
    """The stored tensors by name, read by numpy; each lies inside the one data file."""
    assert sorted(p.name for p in model.iterdir()) == ["net.onnx", "net.onnx.data"]
    found, data, size = {}, model / "net.onnx.data", (model / "net.onnx.data").stat().st_size
    kinds = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.UINT8: np.uint8, onnx.TensorProto.UINT4: np.uint8}
    for tensor in onnx.load(model / "net.onnx", load_external_data=False).graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert math.prod(tensor.dims) <= 256
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == data.name
        offset, length = int(place["offset"]), int(place["length"])
        assert offset + length <= size
        dtype = kinds[tensor.data_type]
        found[tensor.name] = np.memmap(data, dtype, "r", offset, length // np.dtype(dtype).itemsize), [*tensor.dims]
    return found


def nibbles(packed):
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1).astype(np.float32)


def nbits_rows(found, name):
    """Rows of MatMulNBits' matrix, [ROWS, WIDTH]."""
    codes, shape = found[f"{name}.qweight"]
    code = nibbles(codes.reshape(shape)[:ROWS])  # [ROWS, blocks, 64]
    scales = found[f"{name}.scales"][0].reshape(WIDTH, -1)[:ROWS, :, None]
    zeros = nibbles(found[f"{name}.zeros"][0].reshape(WIDTH, -1)[:ROWS])[..., None]
    return ((code - zeros) * scales).reshape(ROWS, WIDTH)


def qdq_rows(found, name):
    """The same of a DequantizeLinear that gives the matrix [WIDTH, WIDTH] as it was stored, inputs first."""
    codes, scales, zeros = (found[f"{name}.{part}"][0] for part in ("qweight", "scales", "zeros"))
    code = nibbles(codes.reshape(WIDTH, -1)[:, : ROWS // 2])
    zero = nibbles(zeros.reshape(-1, WIDTH // 2)[:, : ROWS // 2])
    block = WIDTH // len(zero)
    scale = scales.reshape(-1, WIDTH)[:, :ROWS]
    return ((code - zero.repeat(block, 0)) * scale.repeat(block, 0)).T


def outputs(model, names, x):
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return ort.InferenceSession(str(model / "net.onnx"), settings).run(names, {"x": x})


def source_rows(source, number):
    data = np.memmap(source / "net.onnx.data", np.float32, "r", number * 4 * WIDTH * WIDTH, (WIDTH, WIDTH))
    return np.array(data[:, :ROWS].T)


@pytest.mark.parametrize(("encoding", "rows_of"), [("nbits", nbits_rows), ("qdq", qdq_rows)])
def test_weights_alone_are_streamed(encoding, rows_of, source):
    model, report = quantize(source, "-a", "rtn", "--encoding", encoding)
    assert report["peak_bytes"] < 0.8 * COPY
    found, x = tensors(model), np.random.default_rng(1).standard_normal((2, WIDTH), np.float32)
    for number, y in zip((0, 5), outputs(model, ["y0", "y5"], x), strict=True):
        rows = rows_of(found, f"w{number}")
        assert np.linalg.norm(rows - source_rows(source, number)) < 0.12 * np.linalg.norm(rows)
        np.testing.assert_allclose(y[:, :ROWS], x @ rows.T, atol=1e-4 * np.abs(y).max())


def test_gptq_of_one_matrix_holds_that_one(source):
    choice = ["--nodes-include", f"^m{LAST}$", "--calibration-inputs", source.parent / "inputs.npz"]
    model, report = quantize(source, "-a", "gptq", *choice)
    assert report["peak_bytes"] < COPY
    assert [layer["name"] for layer in report["layers"]] == [f"w{LAST}"]
    found = tensors(model)
    assert sorted(n for n in found if "." not in n) == sorted(f"w{n}" for n in range(LAST))
    x = np.random.default_rng(1).standard_normal((2, WIDTH), np.float32)
    y, last = outputs(model, ["y0", f"y{LAST}"], x)
    wanted = y @ nbits_rows(found, f"w{LAST}").T
    np.testing.assert_allclose(last[:, :ROWS], wanted, atol=1e-4 * np.abs(last).max())


def test_dynamic_integers(source):
    """onnxruntime's quantizer sees stand-ins only."""
    model, report = quantize(source, "-a", "dynamic")
    assert report["peak_bytes"] < 0.8 * COPY
    tensors(model)
    x = np.random.default_rng(1).standard_normal((2, WIDTH), np.float32)
    (y,) = outputs(model, ["y5"], x)
    wanted = x @ source_rows(source, 5).T
    assert np.linalg.norm(y[:, :ROWS] - wanted) < 0.03 * np.linalg.norm(wanted)
