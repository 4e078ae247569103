"""Graphs that cannot be quantized: each is refused by one line that says why, and nothing is left behind."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_graphs import N, graph_model
from quantcli.errors import InputError, QuantcliError
from quantcli.graphs.model.files import save_graph
from quantcli.options import GraphOptions, QuantizeOptions
from quantcli.pipelines import quantize

WIDTH = 32
NODES = [
    N("MatMul", "x a", "h", "one"),
    N("Relu", "h", "r", "relu"),
    N("Gemm", "r b bias", "g", "two", {"transB": 1}),
    N("MatMul", "g c", "y", "three"),
]
CASES, PARTS = 1000, 10


def weights(**changed):
    random = np.random.default_rng(0)
    made = {name: random.standard_normal((WIDTH, WIDTH)).astype(np.float32) for name in "abc"}
    return made | {"bias": random.standard_normal(WIDTH).astype(np.float32)} | changed


@pytest.fixture
def path(tmp_path):
    save_graph(graph_model(NODES, weights()), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def run(path, algorithm="rtn", **graph):
    size = {} if algorithm in ("dynamic", "static") else {"group_size": 16}
    options = QuantizeOptions(
        str(path), path.parent / "out", algorithm=algorithm, **size, graph=GraphOptions(**graph), force=True
    )
    return quantize.run(options)


def edit(path, change):
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())


def refused(path, message, error=InputError, **given):
    before = sorted(p.name for p in path.parent.iterdir())
    with pytest.raises(error, match=message) as refusal:
        run(path, **given)
    assert "\n" not in refusal.value.message
    assert sorted(p.name for p in path.parent.iterdir()) == before


def twice(proto):
    proto.graph.initializer.append(proto.graph.initializer[0])


def lose(proto):
    proto.graph.node[1].input[0] = "nowhere"


def same_output(proto):
    proto.graph.node[1].output[0] = "h"


def drop_output(proto):
    proto.graph.output[0].name = "nothing"


def no_type(proto):
    proto.graph.initializer[0].data_type = 0


def no_type_at_all(proto):
    no_type(proto)
    del proto.graph.value_info[:]


def negative_axis(proto):
    proto.graph.initializer[0].dims[0] = -4


def other_shape(proto):
    proto.graph.initializer[0].dims[0] = 7


def old(proto):
    proto.opset_import[0].version = 6


def untyped_attribute(proto):
    proto.graph.node[2].attribute[0].type = onnx.AttributeProto.UNDEFINED


def float_attribute(proto):
    proto.graph.node[2].attribute[0].type = onnx.AttributeProto.FLOAT


def other_type(proto):
    next(v for v in proto.graph.value_info if v.name == "a").type.tensor_type.elem_type = 3


def too_new(proto):
    proto.opset_import[0].version = 99


def too_new_a_format(proto):
    proto.ir_version = 99


def before_the_file(proto):
    next(e for e in proto.graph.initializer[0].external_data if e.key == "offset").value = "-8"


def no_number(proto):
    next(e for e in proto.graph.initializer[0].external_data if e.key == "offset").value = "4o"


def external_constant(proto):
    """An attribute's data may not lie elsewhere either."""
    tensor = onnx.TensorProto(name="k", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    node = proto.graph.node.add(op_type="Constant", output=["k"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (twice, "two initializers named 'a'"),
        (lose, "node 'relu' reads 'nowhere', which nothing makes"),
        (same_output, "two tensors named 'h'"),
        (drop_output, "nothing makes its output 'nothing'"),
        (no_type, "another type than it has"),
        (no_type_at_all, "no such type or shape"),
        (negative_axis, "no such type or shape"),
        (other_shape, "its shape takes"),
        (old, "opset 6 cannot be converted to 13: Gemm 'two': "),
        (too_new, "has opset 99, [0-9]+ is the latest"),
        (too_new_a_format, "has IR version 99, [0-9]+ is the latest"),
        (before_the_file, "has 4096 bytes from byte -8 of net.onnx.data on"),
        (untyped_attribute, "attribute 'transB' of node 'two' has no type"),
        (float_attribute, "attribute 'transB' of node 'two' is no whole number"),
        (other_type, "'a' is said to have another type than it has"),
        (no_number, "a place or length that is no number"),
        (external_constant, "'../secret' of k is no plain file of its folder"),
    ],
)
def test_a_graph_that_contradicts_itself(change, message, path):
    edit(path, change)
    refused(path, message)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "dynamic", "static"])
def test_weights_that_are_no_numbers(value, algorithm, tmp_path):
    broken = weights()["b"]
    broken[3, 5] = value
    save_graph(graph_model(NODES, weights(b=broken)), tmp_path / "net.onnx")
    graph = {}
    if algorithm in ("gptq", "static"):
        np.savez(tmp_path / "inputs.npz", x=np.ones((8, WIDTH), np.float32))
        graph = {"calibration_inputs": tmp_path / "inputs.npz"}
    refused(tmp_path / "net.onnx", "holds NaN or infinit", algorithm=algorithm, **graph)


@pytest.mark.parametrize("algorithm", ["rtn", "dynamic"])
@pytest.mark.parametrize(
    "change", [twice, lose, too_new, no_number, before_the_file, external_constant, untyped_attribute]
)
def test_every_refusal_of_a_file_says_what_to_do(change, algorithm, path):
    edit(path, change)
    with pytest.raises(InputError) as refusal:
        run(path, algorithm)
    assert refusal.value.exit_code == 3 and refusal.value.hint


def test_inputs_that_are_no_numbers(path):
    np.savez(path.parent / "inputs.npz", x=np.full((8, WIDTH), np.nan, np.float32))
    refused(path, "NaN|not finite", algorithm="gptq", calibration_inputs=path.parent / "inputs.npz")


def test_files_that_are_no_graphs(path):
    refused(path.parent / "missing.onnx", "does not exist")
    other = path.parent / "other.onnx"
    other.write_bytes(b"")
    refused(other, "is not an ONNX graph")
    other.write_bytes(path.read_bytes()[:100])
    refused(other, "is not an ONNX graph")
    other.unlink()
    shutil.copy(path, path.parent / "second.onnx")
    with pytest.raises(InputError, match=r"holds 2 ONNX graphs: net.onnx, second.onnx"):
        quantize.run(QuantizeOptions(str(path.parent), path.parent.parent / "out", algorithm="rtn"))


def test_data_that_is_not_there(path):
    data = path.with_name("net.onnx.data")
    content = data.read_bytes()
    data.write_bytes(content[:-8])
    refused(path, "which is shorter")
    data.unlink()
    refused(path, "no plain file")


def test_nothing_to_quantize(tmp_path):
    save_graph(graph_model([N("Relu", "x", "y", "r")], {}), tmp_path / "net.onnx")
    refused(tmp_path / "net.onnx", "has no weight to quantize")
    save_graph(graph_model([N("MatMul", "x z", "y", "m")], {}, inputs="x z"), tmp_path / "net.onnx")
    refused(tmp_path / "net.onnx", "has no weight to quantize")
    refused(tmp_path / "net.onnx", "what its products multiply is computed", algorithm="dynamic")
    wide = {"a": np.ones((WIDTH, WIDTH))}
    save_graph(graph_model([N("MatMul", "x a", "y", "m")], wide, dtype=ir.DataType.DOUBLE), tmp_path / "net.onnx")
    refused(tmp_path / "net.onnx", "neither float32 nor float16")


def test_a_graph_that_is_quantized_already(path):
    run(path)
    again = path.parent / "out" / "model" / "net.onnx"
    with pytest.raises(InputError, match="is quantized already"):
        quantize.run(QuantizeOptions(str(again), path.parent / "again", algorithm="rtn"))


def test_an_opset_that_cannot_be_converted(path):
    """An operator that changed its meaning: its new form cannot say what the old one did."""
    norm = N("BatchNormalization", "x bias bias bias bias", "h", "norm", {"spatial": 0})
    save_graph(graph_model([norm, *NODES[1:]], weights(), opset=8), path)
    refused(
        path,
        r"^opset 8 cannot be converted to 21: BatchNormalization 'norm': Attribute spatial must have value 1$",
        encoding="qdq",
    )
    refused(
        path,
        r"^opset 8 cannot be converted to 13: BatchNormalization 'norm': Attribute spatial must have value 1$",
        algorithm="dynamic",
    )


def damage(graph, data, generator):
    """Flips, inserts, repeats, zeroes or cuts bytes of the graph, or cuts its data."""
    out = bytearray(graph)
    at, length = generator.randrange(len(out)), generator.choice([1, 2, 8, 60])
    kind = generator.choice(["flip", "flip", "flip", "insert", "repeat", "zero", "cut", "data"])
    if kind == "flip":
        for _ in range(generator.choice([1, 1, 3])):
            out[generator.randrange(len(out))] ^= 1 << generator.randrange(8)
    elif kind == "insert":
        out[at:at] = generator.randbytes(length)
    elif kind == "repeat":
        out[at:at] = out[at : at + length]
    elif kind == "zero":
        out[at : at + length] = bytes(length)
    elif kind == "cut":
        del out[at:]
    return bytes(out), data[:at] if kind == "data" else data


@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_graphs(part, path):
    """Each is refused by one of our errors or quantized; never another exception, never anything left behind."""
    data = path.with_name("net.onnx.data")
    sound, stored = path.read_bytes(), data.read_bytes()
    np.savez(path.parent / "inputs.npz", x=np.ones((4, WIDTH), np.float32))
    done = 0
    for number in range(part, CASES, PARTS):
        graph, kept = damage(sound, stored, random.Random(number))
        path.write_bytes(graph)
        data.write_bytes(kept)
        calibrated = number % 3 == 0
        given = {"calibration_inputs": path.parent / "inputs.npz"} if calibrated else {}
        try:
            result = run(path, "gptq" if calibrated else "rtn", **given)
            assert json.loads((Path(result.output) / "quantcli.json").read_text())["kind"] == "onnx"
            done += 1
        except QuantcliError as error:
            assert error.exit_code in (2, 3), f"case {number}: {error.message}"
            assert error.message.strip() and len(error.message) < 1000, f"case {number}"
        except Exception as error:
            raise AssertionError(f"case {number}") from error
        names = {p.name for p in path.parent.iterdir()}
        assert names <= {"net.onnx", "net.onnx.data", "inputs.npz", "out"}, f"case {number}: {names}"
    assert 0 < done < CASES // PARTS
