import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import small_graphs
from quantcli.cli import app
from quantcli.graphs.model.files import save_graph

SAMPLES = np.random.default_rng(3).normal(size=(24, 3, 12, 12)).astype(np.float32)
SCRIPT = """
import numpy as np
samples = np.load({file!r})["x"]
class Reader:
    def __init__(self): self.left = [samples[i : i + 4] for i in range(0, 24, 4)]
    def get_next(self): return {{"x": self.left.pop(0)}} if self.left else None
def reader(data_dir, batch_size): return Reader()
def pairs(): return [({{"x": samples[i : i + 4]}}, 0) for i in range(0, 24, 4)]
"""


@pytest.fixture
def place(tmp_path):
    """A folder with a CNN, samples of it as arrays, and a user's script."""
    (tmp_path / "in").mkdir()
    small_graphs.cnn(tmp_path / "in" / "model.onnx")
    (tmp_path / "in" / "labels.txt").write_text("a\nb\n")
    np.savez(tmp_path / "samples.npz", x=SAMPLES)
    (tmp_path / "user_script.py").write_text(SCRIPT.format(file=str(tmp_path / "samples.npz")))
    return tmp_path


def quantize(place, *words, model="in", expected=0, output="out"):
    argv = ["quantize", "-m", str(place / model), "-o", str(place / output), "--force", *map(str, words)]
    assert app.run(argv) == expected


def error(place, output="out", model="in"):
    def run(path):
        return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": SAMPLES})[0]

    before, after = run(place / model / "model.onnx"), run(place / output / "model" / "model.onnx")
    return np.linalg.norm(after - before) / np.linalg.norm(before)


def report(place, output="out"):
    return json.loads((place / output / "report.json").read_text())


def types(place, output="out"):
    graph = ir.load(place / output / "model" / "model.onnx").graph
    return {v.dtype.name.lower() for v in graph.initializers.values() if len(v.shape) > 1}


def samples(place):
    return ["--calibration-inputs", place / "samples.npz", "--batch-size", "4"]


@pytest.mark.parametrize("algorithm", ["dynamic", "static"])
def test_a_folder_with_all_that_belongs_to_it(algorithm, place):
    quantize(place, "-a", algorithm, *(samples(place) if algorithm == "static" else []))
    files = sorted(p.name for p in (place / "out" / "model").iterdir())
    assert files == ["labels.txt", "model.onnx", "model.onnx.data"]
    onnx.checker.check_model(str(place / "out" / "model" / "model.onnx"))
    assert error(place) < 0.04 and types(place) == {"uint8"}
    told = report(place)
    assert told["quantized"] == ["conv1", "conv2", "head"] and told["plan"]["algorithm"] == algorithm
    assert told["size_bytes"] < told["parent_size_bytes"] and told["comparison"] is None
    manifest = json.loads((place / "out" / "quantcli.json").read_text())
    assert manifest["kind"] == "onnx" and manifest["options"]["algorithm"] == algorithm


@pytest.mark.parametrize(("words", "weights", "activations"), [
    (["--bits", "4", "--activation-type", "uint16"], {"uint4"}, "UINT16"),
    (["--bits", "8", "--weight-type", "int8", "--reduce-range"], {"int8"}, "UINT8"),
    (["--encoding", "qoperator", "--per-channel", "--calibrate-method", "entropy"], {"int8", "uint8"}, "UINT8"),
    (["--calibrate-method", "percentile", "--set", "activation_symmetric=true"], {"uint8"}, "UINT8"),
])  # fmt: skip
def test_flags_reach_what_they_name(words, weights, activations, place):
    quantize(place, "-a", "static", *samples(place), *words)
    assert types(place) == weights
    initializers = ir.load(place / "out" / "model" / "model.onnx").graph.initializers
    assert initializers["x_zero_point"].dtype.name == activations


def test_every_source_of_samples_gives_the_same(place):
    quantize(place, "-a", "static", *samples(place), output="npz")
    script = ["--user-script", place / "user_script.py", "--data-function"]
    for name in ("reader", "pairs"):
        quantize(place, "-a", "static", *script, name, output=name)
        for file in ("model.onnx", "model.onnx.data"):
            assert (place / name / "model" / file).read_bytes() == (place / "npz" / "model" / file).read_bytes()


def test_images(place):
    image = pytest.importorskip("PIL.Image")
    (place / "photos").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 20, 16, 3), np.uint8)):
        image.fromarray(pixels).save(place / "photos" / f"{i}.png")
    spec = "size=12x12,mean=0.5,std=0.25"
    quantize(place, "-a", "static", "--calibration-inputs", place / "photos", "--image-spec", spec)
    scale = ir.load(place / "out" / "model" / "model.onnx").graph.initializers["x_scale"].const_value.numpy()
    assert 2.5 / 255 < scale < 4.01 / 255


def test_ranges_are_kept_for_the_next_run(place, capsys):
    cache = ["--calibration-cache", place / "ranges.json"]
    quantize(place, "-a", "static", *samples(place), *cache)
    first = (place / "out" / "model" / "model.onnx.data").read_bytes()
    capsys.readouterr()
    quantize(place, "-a", "static", *cache)
    assert "none are measured" in capsys.readouterr().err
    assert (place / "out" / "model" / "model.onnx.data").read_bytes() == first
    quantize(place, "-a", "static", *cache, "--bias-correction", expected=2)
    assert "calibration inputs are needed" in capsys.readouterr().err


def test_the_debugging_view(place, capsys):
    quantize(place, "-a", "static", *samples(place), "--debug-activations", "--json")
    nodes = json.loads(capsys.readouterr().out)["comparison"]["nodes"]
    assert [n["own_db"] for n in nodes] == sorted(n["own_db"] for n in nodes)
    assert {"conv1", "conv2", "head"} <= {n["name"] for n in nodes}
    quantize(place, "-a", "dynamic", *samples(place), "--debug-activations")
    out = capsys.readouterr().out
    assert "own dB" in out and "conv1" in out and "noise of the outputs on 6 samples: y " in out


def test_the_worst_nodes_stay_float(place):
    """The head's weights leave one channel all the codes: it is excluded, and the error is that of the others."""
    model = ir.load(place / "in" / "model.onnx")
    head = model.graph.initializers["w3"].const_value.numpy().copy()
    head[0] *= 200
    model.graph.initializers["w3"].const_value = ir.Tensor(head, name="w3")
    (place / "bad").mkdir()
    save_graph(model, place / "bad" / "model.onnx")
    words = ["-a", "static", *samples(place), "--op-types", "Conv,Gemm", "--encoding", "qdq"]
    quantize(place, *words, "--debug-activations", model="bad", output="whole")
    quantize(place, *words, "--exclude-worst", "1", model="bad")
    found, before = report(place), report(place, "whole")["comparison"]["nodes"]
    assert found["excluded"] == [before[0]["name"]] == ["head"]
    assert found["quantized"] == ["conv1", "conv2"] and "head" in found["kept"]
    assert error(place, "out", "bad") < 0.2 * error(place, "whole", "bad")


def test_smoothquant_comes_first(place, capsys):
    small_graphs.mlp(place / "mlp.onnx", hidden=256)
    np.savez(place / "rows.npz", x=np.random.default_rng(1).normal(size=(32, 32)).astype(np.float32))
    words = ["--calibration-inputs", place / "rows.npz", "--batch-size", "8"]
    quantize(place, "-a", "smoothquant,dynamic", *words, "--set", "alpha=0.5", model="mlp.onnx")
    assert "2 activations" not in capsys.readouterr().out
    assert any("1 activations folded, 1 with a Mul" in note for note in report(place)["notes"])
    assert list(report(place)["plan"]["transforms"]) == ["smoothquant"]
    quantize(place, "-a", "smoothquant", *words, model="mlp.onnx", output="static")
    assert report(place, "static")["plan"]["algorithm"] == "static"


@pytest.mark.parametrize(("words", "message"), [
    (["-a", "static"], "calibration inputs are needed"),
    (["-a", "dynamic", "--bits", "4"], "dynamic makes 8 bits, not 4"),
    (["-a", "dynamic", "--group-size", "32"], "--group-size has no effect with dynamic"),
    (["-a", "dynamic", "--encoding", "qdq"], "dynamic has no --encoding qdq"),
    (["-a", "dynamic", "--calibration-cache", "c"], "dynamic measures no ranges"),
    (["-a", "dynamic", "--calibration-inputs", "x.npz"], "dynamic uses no calibration inputs"),
    (["-a", "dynamic", "--data", "x.txt"], "dynamic uses no calibration inputs"),
    (["-a", "dynamic", "--seq-len", "9"], "dynamic uses no calibration inputs"),
    (["-a", "static", "--accuracy-level", "4", "--calibration-inputs", "x"], "--accuracy-level has no effect"),
    (["-a", "static", "--bits", "4", "--weight-type", "int8", "--calibration-inputs", "x"], "contradict each other"),
    (["-a", "static", "--calibrate-method", "distribution", "--calibration-inputs", "x"], "ranges for float8"),
    (["-a", "dynamic", "--activation-type", "int8"], "dynamic has no option 'activation_type'"),
    (["-a", "rtn", "--per-channel"], "rtn has no option 'per_channel'"),
    (["-a", "rtn", "--debug-activations"], "--debug-activations is for activations"),
    (["-a", "rtn", "--exclude-worst", "1"], "--exclude-worst is for activations"),
    (["-a", "rtn", "--encoding", "qoperator"], "weights alone have no operators on integers"),
    (["-a", "static", "--data-function", "f"], "--user-script and --data-function go together"),
])  # fmt: skip
def test_what_has_no_effect_is_refused(words, message, place, capsys):
    quantize(place, *words, expected=2)
    assert message in capsys.readouterr().err
    assert not (place / "out").exists()


def test_excluding_everything_is_refused(place, capsys):
    quantize(place, "-a", "static", *samples(place), "--op-types", "Conv", "--exclude-worst", "2", expected=2)
    assert "--exclude-worst 2 leaves nothing of 2 quantized nodes" in capsys.readouterr().err
    assert [p.name for p in place.iterdir() if "out" in p.name] == []


def test_an_older_graph_is_converted_and_that_is_said(place, capsys):
    small_graphs.cnn(place / "in" / "model.onnx", opset=11)
    quantize(place, "-a", "dynamic")
    assert "converted from opset 11 to 13; its outputs" in capsys.readouterr().err
    found = report(place)["conversion"]
    assert (found["before"], found["after"]) == (11, 13) and found["difference"] < 1e-5
    quantize(place, "-a", "smoothquant,static", *samples(place))
    assert any("converted from opset 11 to 13" in note for note in report(place)["notes"])
