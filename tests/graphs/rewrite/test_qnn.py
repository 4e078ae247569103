import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import small_graphs
from onnx_graphs import N, graph_model
from quantcli.algorithms.graph.static import StaticOptions, quantize
from quantcli.errors import InputError, UsageError
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.rewrite.prepare import prepare
from quantcli.graphs.rewrite.qnn import QnnReader, prepare_qnn

R = np.random.default_rng(0)
IMAGES = R.normal(size=(6, 4, 3, 12, 12)).astype(np.float32)


class Reader:
    """Batches, again after rewind()."""

    def __init__(self, batches):
        self.batches = batches
        self.rewind()

    def rewind(self):
        self.rest = iter(self.batches)

    def get_next(self):
        found = next(self.rest, None)
        return None if found is None else {"x": found}


def run(path, x):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def qnn(path, batches, target, debug=False, cache=None, **settings):
    target.parent.mkdir(exist_ok=True)
    return quantize(path, target, StaticOptions(preprocess="qnn", **settings), Reader(batches), cache, debug)


def error(before, after):
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


def codes(path, name):
    return ir.load(path).graph.initializers[name].const_value.numpy()


def test_everything_between_inputs_and_outputs_has_a_grid(tmp_path):
    """With channels last the first node only moves values; it is in integers like the others."""
    source, target = small_graphs.cnn(tmp_path / "cnn.onnx"), tmp_path / "out" / "q.onnx"
    made = qnn(source, IMAGES, target, inputs_to_make_channel_last=("x",))
    graph = ir.load(target).graph
    for node in graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[0].producer().op_type == "DequantizeLinear", node
            assert all(user.op_type == "QuantizeLinear" for user, _ in node.outputs[0].uses()), node
    assert made.quantized == ("conv1", "conv2", "head") and any("x is channel-last now" in n for n in made.notes)
    x = IMAGES[0]
    assert error(run(source, x), run(target, np.moveaxis(x, 1, -1))) < 0.02


@pytest.mark.parametrize(("settings", "weights", "activations", "limit"), [
    ({}, {"UINT8"}, "UINT8", 0.02),
    ({"activation_type": "uint16"}, {"UINT8"}, "UINT16", 0.02),
    ({"activation_type": "uint16", "weight_type": "int8"}, {"INT8"}, "UINT16", 0.02),
    ({"activation_type": "int16", "weight_type": "int8", "per_channel": True}, {"INT8"}, "INT16", 0.02),
    ({"activation_type": "uint16", "weight_type": "int4", "per_channel": True}, {"INT4"}, "UINT16", 0.2),
    ({"activation_type": "int8", "weight_type": "int8"}, {"INT8"}, "INT8", 0.03),
])  # fmt: skip
def test_types_are_those_asked_for(settings, weights, activations, limit, tmp_path):
    source, target = small_graphs.cnn(tmp_path / "cnn.onnx"), tmp_path / "out" / "q.onnx"
    qnn(source, IMAGES, target, **settings)
    graph = ir.load(target).graph
    kept = {v.dtype.name for n, v in graph.initializers.items() if n.endswith("weight_quantized") or n[0] == "w"}
    assert {k for k in kept if k != "FLOAT"} == weights
    zeros = {n.inputs[2].dtype.name for n in graph if n.op_type == "QuantizeLinear"}
    assert zeros == {activations}
    if settings.get("weight_type", "").startswith("int"):
        assert not codes(target, "w2_zero_point").any()
    assert codes(target, "w2_scale").size == (24 if settings.get("per_channel") else 1)
    assert error(run(source, IMAGES[0]), run(target, IMAGES[0])) < limit


def test_products_have_one_scale_whatever_per_channel_says(tmp_path):
    source, target = small_graphs.mlp(tmp_path / "mlp.onnx"), tmp_path / "out" / "q.onnx"
    rows = R.normal(size=(4, 8, 32)).astype(np.float32)
    qnn(source, rows, target, per_channel=True, weight_type="int8")
    assert codes(target, "w1_scale").size == codes(target, "w2_scale").size == 1


def squashed(tmp_path):
    weights = {name: R.normal(size=(8, 8)).astype(np.float32) for name in "wv"}
    nodes = [N("MatMul", "x w", "a", "first"), N("Sigmoid", "a", "s", "sigmoid"), N("MatMul", "s v", "b", "second")]
    nodes.append(N("Tanh", "b", "y", "tanh"))
    save_graph(graph_model(nodes, weights, opset=17), tmp_path / "squashed.onnx")
    return tmp_path / "squashed.onnx", R.normal(size=(4, 16, 8)).astype(np.float32)


def test_squashing_has_its_fixed_grid_in_16_bits(tmp_path):
    source, rows = squashed(tmp_path)
    target = tmp_path / "out" / "q.onnx"
    qnn(source, rows, target, activation_type="uint16")
    assert codes(target, "s_scale") == 2**-16 and codes(target, "s_zero_point") == 0
    assert codes(target, "y_scale") == 2**-15 and codes(target, "y_zero_point") == 2**15
    assert codes(target, "w_quantized").dtype == np.uint8
    assert error(run(source, rows[0]), run(target, rows[0])) < 0.02


def test_some_nodes_in_16_bits(tmp_path):
    source, rows = squashed(tmp_path)
    qnn(source, rows, tmp_path / "out" / "8.onnx")
    made = qnn(source, rows, tmp_path / "out" / "q.onnx", debug=True, nodes_16bit=("second",))
    assert {n.name for n in made.comparison.nodes} == {"first", "sigmoid", "second", "tanh"}
    graph = ir.load(tmp_path / "out" / "q.onnx").graph
    second = next(n for n in graph if n.name == "second")
    assert second.inputs[0].producer().inputs[2].dtype.name == "UINT16"
    assert next(user for user, _ in second.outputs[0].uses()).inputs[2].dtype.name == "UINT16"
    assert codes(tmp_path / "out" / "q.onnx", "x_zero_point").dtype == np.uint8
    whole, mixed = (error(run(source, rows[0]), run(tmp_path / "out" / f, rows[0])) for f in ("8.onnx", "q.onnx"))
    assert mixed < 0.9 * whole
    with pytest.raises(UsageError, match="sigmoid stays float"):
        qnn(source, rows, tmp_path / "out" / "n.onnx", nodes_16bit=("sigmoid",), op_types=("MatMul",))


def test_clipping_nodes_stay_where_asked(tmp_path):
    source = small_graphs.cnn(tmp_path / "cnn.onnx")
    for keep in (False, True):
        qnn(source, IMAGES, tmp_path / "out" / "q.onnx", keep_removable_activations=keep)
        assert any(n.op_type == "Relu" for n in ir.load(tmp_path / "out" / "q.onnx").graph) == keep
        assert error(run(source, IMAGES[0]), run(tmp_path / "out" / "q.onnx", IMAGES[0])) < 0.02


def test_axes_get_their_size(tmp_path):
    source, target = small_graphs.cnn(tmp_path / "cnn.onnx"), tmp_path / "out" / "q.onnx"
    one = IMAGES.reshape(-1, 1, 3, 12, 12)
    made = qnn(source, one, target, fixed_dims=("n=1",))
    assert open_graph(target).graph.inputs[0].shape == (1, 3, 12, 12) and not made.notes
    assert open_graph(target).graph.outputs[0].shape == (1, 10)
    with pytest.raises(InputError, match="a sample for QNN: x has shape 4x3x12x12, the graph takes 1x3x12x12"):
        qnn(source, IMAGES, target, fixed_dims=("n=1",))
    with pytest.raises(UsageError, match="no input has an axis 'm' that may have any size"):
        qnn(source, one, target, fixed_dims=("m=1",))
    made = qnn(source, IMAGES, target)
    assert made.notes == ("QNN takes inputs of fixed sizes, these axes may have any: n; say fixed_dims=n=1",)


def test_axes_without_a_name_are_counted(tmp_path):
    model = open_graph(small_graphs.cnn(tmp_path / "cnn.onnx"))
    model.graph.inputs[0].shape = ir.Shape([None, 3, None, 12])
    save_graph(model, tmp_path / "open.onnx")
    made = qnn(tmp_path / "open.onnx", IMAGES, tmp_path / "out" / "q.onnx", fixed_dims=("x.2=12",))
    assert open_graph(tmp_path / "out" / "q.onnx").graph.inputs[0].shape[1:] == (3, 12, 12)
    assert made.notes == ("QNN takes inputs of fixed sizes, these axes may have any: x.0; say fixed_dims=x.0=1",)


def test_a_range_is_never_nothing(tmp_path):
    """QNN refuses scales of almost nothing; a channel that never speaks has one of 1e-4 / 255."""
    nodes = [N("Mul", "x zero", "h", "mute"), N("Add", "h x", "y", "add")]
    save_graph(graph_model(nodes, {"zero": np.zeros(1, np.float32)}, opset=17), tmp_path / "mute.onnx")
    qnn(tmp_path / "mute.onnx", R.normal(size=(2, 4, 8)).astype(np.float32), tmp_path / "out" / "q.onnx")
    assert codes(tmp_path / "out" / "q.onnx", "h_scale") == pytest.approx(1e-4 / 255)


def test_with_what_comes_before_rounding(tmp_path):
    source = small_graphs.separable(tmp_path / "float.onnx")
    images = R.normal(size=(6, 4, 3, 8, 8)).astype(np.float32)
    turned = {"inputs_to_make_channel_last": ("x",), "weight_type": "int8"}
    qnn(source, images, tmp_path / "out" / "plain.onnx", **turned)
    made = qnn(source, images, tmp_path / "out" / "better.onnx", equalize=True, bias_correction=True, **turned)
    assert made.equalized and made.corrected
    x = images[0]
    plain, better = (
        error(run(source, x), run(tmp_path / "out" / f"{name}.onnx", np.moveaxis(x, 1, -1)))
        for name in ("plain", "better")
    )
    assert better < 0.7 * plain


def test_a_graph_that_computes_something_else_is_refused(tmp_path):
    source = small_graphs.cnn(tmp_path / "cnn.onnx")
    prepare(source, tmp_path / "ready.onnx")
    prepare_qnn(tmp_path / "ready.onnx", tmp_path / "qnn.onnx", ["x"])
    QnnReader(Reader(IMAGES), tmp_path / "ready.onnx", tmp_path / "qnn.onnx", ["x"], []).get_next()
    model = open_graph(tmp_path / "qnn.onnx")
    model.graph.initializers["b3"].const_value = ir.Tensor(np.full(10, 0.1, np.float32))
    save_graph(model, tmp_path / "other.onnx")
    reader = QnnReader(Reader(IMAGES), tmp_path / "ready.onnx", tmp_path / "other.onnx", ["x"], [])
    with pytest.raises(InputError, match="the graph gives another y with its operators fused"):
        reader.get_next()


@pytest.mark.parametrize(("settings", "message"), [
    ({"fuse_layernorm": True}, "no parts of a LayerNormalization to fuse"),
    ({"inputs_to_make_channel_last": ("y",)}, "the graph has no input 'y'"),
    ({"outputs_to_make_channel_last": ("y",)}, "output y has 2 axes"),
])  # fmt: skip
def test_what_the_graph_does_not_have_is_refused(settings, message, tmp_path):
    source = small_graphs.cnn(tmp_path / "cnn.onnx")
    with pytest.raises(UsageError, match=message):
        qnn(source, IMAGES, tmp_path / "out" / "q.onnx", **settings)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("settings", "message"), [
    ({"fuse_layernorm": True, "preprocess": "none"}, "fuse_layernorm is a step of preprocess=qnn"),
    ({"fixed_dims": ("n=1",), "preprocess": "none"}, "fixed_dims is a step of preprocess=qnn"),
    ({"encoding": "qoperator"}, "QNN reads graphs with QDQ nodes"),
    ({"nodes_16bit": ("a",), "activation_type": "uint16"}, "nodes_16bit has no effect, all activations are uint16"),
    ({"keep_removable_activations": True, "activation_symmetric": True}, "keep_removable_activations has no effect"),
    ({"fixed_dims": ("n",)}, "fixed_dims 'n' is no size of an axis"),
    ({"fixed_dims": ("n=0",)}, "fixed_dims 'n=0' is no size of an axis"),
])  # fmt: skip
def test_options_without_effect_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        StaticOptions(**{"preprocess": "qnn", **settings})
