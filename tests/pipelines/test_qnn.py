"""Graphs for Qualcomm's provider through the command, run on the CPU."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import small_graphs
from onnx_graphs import N, graph_model
from quantcli.cli import app
from quantcli.graphs.model.files import save_graph

IMAGES = np.random.default_rng(3).normal(size=(24, 3, 12, 12)).astype(np.float32)


def run(path, **feed):
    """Without fused nodes: products of uint8 and int8 overflow in some on processors without VNNI."""
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"]).run(None, feed)[0]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "in").mkdir()
    small_graphs.cnn(tmp_path / "in" / "model.onnx")
    np.savez(tmp_path / "samples.npz", x=IMAGES)
    return tmp_path


def quantize(place, *words, model="in", expected=0, output="out"):
    argv = ["quantize", "-m", place / model, "-o", place / output, "--force", *words]
    assert app.run([str(word) for word in argv]) == expected


def static(place, *words, samples="samples.npz", **where):
    quantize(
        place,
        "-a",
        "static",
        "--preprocess",
        "qnn",
        *(["--calibration-inputs", place / samples] if samples else []),
        *words,
        **where,
    )


def report(place, output="out"):
    return json.loads((place / output / "report.json").read_text())


def written(place, output="out"):
    return place / output / "model" / "model.onnx"


def error(before, after):
    return np.linalg.norm(after - before) / np.linalg.norm(before)


def test_a_folder_for_qnn(place, capsys):
    turned = ["--inputs-to-make-channel-last", "x", "--set", "fixed_dims=n=1"]
    static(place, *turned, "--per-channel", "--weight-type", "int8", "--debug-activations")
    said = capsys.readouterr()
    assert "input x is channel-last now, 1x12x12x3: feed it so" in said.err and "Transpose_x" in said.out
    path = written(place)
    onnx.checker.check_model(str(path), full_check=True)
    graph = ir.load(path).graph
    assert graph.inputs[0].name == "x" and graph.inputs[0].shape == (1, 12, 12, 3)
    assert [v.name for v in graph.outputs] == ["y"]
    assert all(v.uses() for v in graph.initializers.values())
    assert graph.initializers["w2_scale"].const_value.numpy().shape == (24,)
    told = report(place)
    assert told["quantized"] == ["conv1", "conv2", "head"] and told["size_bytes"] < told["parent_size_bytes"]
    assert told["plan"]["settings"]["preprocess"] == "qnn"
    x = IMAGES[:1]
    assert error(run(place / "in" / "model.onnx", x=x), run(path, x=np.moveaxis(x, 1, -1))) < 0.03
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_a_transformer_in_few_operators(place):
    """Parts of a LayerNormalization and of a Gelu are one node each, of opset 17 though the graph was of 13."""
    random = np.random.default_rng(0)
    weights = {
        "w": random.normal(size=(64, 96)).astype(np.float32) / 8, "v": random.normal(size=(96, 32)).astype(np.float32),
        "gain": random.uniform(0.5, 2, 64).astype(np.float32), "bias": random.normal(size=64).astype(np.float32),
        "two": np.array(2, np.float32), "root": np.array(2**0.5, np.float32), "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32), "eps": np.array(1e-5, np.float32),
    }  # fmt: skip
    nodes = [
        N("ReduceMean", "x", "m", "m", {"axes": [-1]}), N("Sub", "x m", "c", "c"), N("Pow", "c two", "p", "p"),
        N("ReduceMean", "p", "s", "s", {"axes": [-1]}), N("Add", "s eps", "se", "se"), N("Sqrt", "se", "q", "q"),
        N("Div", "c q", "n", "n"), N("Mul", "n gain", "g", "g"), N("Add", "g bias", "b", "b"),
        N("MatMul", "b w", "h", "up"), N("Div", "h root", "d", "d"), N("Erf", "d", "e", "e"),
        N("Add", "e one", "a", "a"), N("Mul", "h a", "ha", "ha"), N("Mul", "ha half", "u", "u"),
        N("MatMul", "u v", "y", "down"),
    ]  # fmt: skip
    (place / "mlp").mkdir()
    model = graph_model(nodes, weights, opset=13, ranks={"x": 3, "y": 3})
    save_graph(model, place / "mlp" / "model.onnx")
    x = random.normal(size=(8, 5, 64)).astype(np.float32)
    np.savez(place / "rows.npz", x=x)
    words = ["--fuse-layernorm", "--activation-type", "uint16", "--weight-type", "int8"]
    static(place, *words, samples="rows.npz", model="mlp")
    graph = ir.load(written(place)).graph
    kinds = [n.op_type for n in graph if not n.op_type.endswith("Linear")]
    assert kinds == ["LayerNormalization", "MatMul", "Gelu", "MatMul"]
    assert graph.initializers["w_quantized"].dtype.name == graph.initializers["gain_quantized"].dtype.name == "INT8"
    before = run(place / "mlp" / "model.onnx", x=x)
    assert error(before, run(written(place), x=x)) < 0.02
    assert "fused for QNN: 1 Gelu, 1 LayerNormalization" in report(place)["notes"]
    # what was transformed before is fused too
    quantize(
        place, "-a", "smoothquant,static", "--preprocess", "qnn", "--fuse-layernorm", "--calibration-inputs",
        place / "rows.npz", model="mlp", output="smooth",
    )  # fmt: skip
    assert [n.op_type for n in ir.load(written(place, "smooth")).graph].count("LayerNormalization") == 1
    assert error(before, run(written(place, "smooth"), x=x)) < 0.05


def test_ranges_are_kept_for_the_next_run(place, capsys):
    words = ["--inputs-to-make-channel-last", "x", "--calibration-cache", place / "ranges.json"]
    static(place, *words)
    first = written(place).read_bytes(), written(place).with_suffix(".onnx.data").read_bytes()
    static(place, *words, samples=None)
    assert first == (written(place).read_bytes(), written(place).with_suffix(".onnx.data").read_bytes())
    capsys.readouterr()
    static(place, *words[2:], samples=None, expected=3)
    assert "was measured with another graph" in capsys.readouterr().err


def test_the_worst_nodes_stay_float(place):
    static(place, "--outputs-to-make-channel-last", "h", "--exclude-worst", "1", model=deep(place))
    told = report(place)
    assert len(told["excluded"]) == 1
    node = next(n for n in ir.load(written(place)).graph if n.name == told["excluded"][0])
    assert all(user.op_type != "QuantizeLinear" for user, _ in node.outputs[0].uses()) or node.op_type == "Conv"


def deep(place):
    """A network whose output has channels."""
    (place / "deep").mkdir()
    random = np.random.default_rng(0)
    weights = {f"w{i}": random.normal(size=(16, c, 3, 3)).astype(np.float32) / 8 for i, c in enumerate((3, 16, 16))}
    nodes = [N("Conv", "x w0", "c0", "c0"), N("Relu", "c0", "r", "r"), N("Conv", "r w1", "c1", "c1")]
    model = graph_model([*nodes, N("Conv", "c1 w2", "h", "c2")], weights, "x", "h", ranks={"x": 4, "h": 4}, opset=17)
    model.graph.inputs[0].shape = ir.Shape(["n", 3, 12, 12])
    save_graph(model, place / "deep" / "model.onnx")
    return "deep"


def test_an_output_with_its_channels_last(place):
    static(place, "--outputs-to-make-channel-last", "h", model=deep(place))
    before, after = run(place / "deep" / "model.onnx", x=IMAGES), run(written(place), x=IMAGES)
    assert after.shape == (24, 6, 6, 16) and error(np.moveaxis(before, 1, -1), after) < 0.05


@pytest.mark.parametrize(("words", "message"), [
    (["-a", "dynamic", "--preprocess", "qnn"], "dynamic has no option 'preprocess'"),
    (["-a", "smoothquant,dynamic", "--preprocess", "qnn"], "dynamic has no option 'preprocess'"),
    (["-a", "gptq", "--preprocess", "qnn"], "gptq has no option 'preprocess'"),
    (["-a", "static", "--preprocess", "npu"], "preprocess is one of none, qnn, got 'npu'"),
    (["-a", "static", "--fuse-layernorm"], "fuse_layernorm is a step of preprocess=qnn"),
    (["-a", "static", "--preprocess", "qnn", "--encoding", "qoperator"], "QNN reads graphs with QDQ nodes"),
    (["-a", "static", "--preprocess", "qnn", "--fuse-layernorm"], "no parts of a LayerNormalization to fuse"),
    (["-a", "static", "--preprocess", "qnn", "--inputs-to-make-channel-last", "z"], "the graph has no input 'z'"),
    (["-a", "static", "--preprocess", "qnn", "--outputs-to-make-channel-last", "y"], "output y has 2 axes"),
])  # fmt: skip
def test_what_has_no_effect_is_refused(words, message, place, capsys):
    samples = ["--calibration-inputs", place / "samples.npz"] if "static" in words else []
    quantize(place, *words, *samples, expected=2)
    assert message in capsys.readouterr().err
    assert not (place / "out").exists()


def test_samples_are_given_as_the_graph_was(place, capsys):
    np.savez(place / "last.npz", x=np.moveaxis(IMAGES, 1, -1))
    static(place, "--inputs-to-make-channel-last", "x", samples="last.npz", expected=3)
    assert "x has shape 1x12x12x3, the graph takes nx3x12x12" in capsys.readouterr().err


def test_inputs_of_genai_are_not_turned(place, capsys):
    (place / "in" / "genai_config.json").write_text("{}")
    static(place, "--inputs-to-make-channel-last", "x", expected=2)
    assert "--inputs-to-make-channel-last is not for folders with genai_config.json" in capsys.readouterr().err
