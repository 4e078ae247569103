import os

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quantcli.errors import InputError
from quantcli.graphs.model.files import open_graph, save_graph


def write(folder):
    weight = ir.Value(name="w", const_value=ir.Tensor(np.arange(4096, dtype=np.float32).reshape(64, 64), name="w"))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("n", 64)))
    node = ir.node("MatMul", [x, weight])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20}, name="g")
    node.outputs[0].name = "y"
    save_graph(ir.Model(graph, ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"


def change(path, **entries):
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(proto.SerializeToString())


def test_weights_stand_beside_the_graph(tmp_path):
    path = write(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
    assert open_graph(path).graph.initializers["w"].const_value.numpy()[3, 5] == 3 * 64 + 5


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../secret"}, "no plain file|outside"),
        ({"location": "/etc/hostname"}, "no plain file"),
        ({"location": "missing.data"}, "no plain file"),
        ({"offset": "64"}, "ends at byte"),
        ({"length": "999999"}, "ends at byte"),
    ],
)
def test_data_outside_the_folder_is_refused(entries, message, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "secret").write_bytes(bytes(20000))
    path = write(tmp_path / "m")
    change(path, **entries)
    with pytest.raises(InputError, match=message):
        open_graph(path)


def test_links_are_refused(tmp_path):
    path = write(tmp_path)
    data = tmp_path / "model.onnx.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no plain file"):
        open_graph(path)


def test_garbage_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a graph at all")
    with pytest.raises(InputError, match="not an ONNX graph"):
        open_graph(tmp_path / "model.onnx")
