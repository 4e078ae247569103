"""`evaluate` on two graphs that are no language models."""

import json

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import small_graphs
import tiny
from quantcli.cli import app
from quantcli.errors import InputError, UsageError
from quantcli.options import EvaluateOptions, GraphEvaluationOptions, QuantizeOptions
from quantcli.pipelines import evaluate, evaluate_graphs, quantize_graph

SCRIPT = """
import numpy as np

def first(session):
    return session.run(None, {"x": np.ones((1, 32), np.float32)})[0].ravel()[0]

def told(session, data_dir, batch_size):
    return len(data_dir) + batch_size / 100

def everything(session, **given):
    return sum(given["data_dir"] == "here" for _ in range(given["batch_size"]))

def samples(data_dir, batch_size):
    for i in range(6):
        yield {"x": np.full((batch_size, 32), i / 6, np.float32)}

def none(): return []
def fails(session): raise RuntimeError("no such file")
def leaves(session): raise SystemExit(0)
def nan(session): return float("nan")
def text(session): return "0.5"
def many(session): return np.zeros(3)
def nothing(session): pass
def wrong(data_dir): yield {"x": np.zeros((1, 31), np.float32)}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A float graph, its quantized copy, inputs and functions."""
    root = tmp_path_factory.mktemp("pair")
    small_graphs.mlp(root / "net.onnx")
    x = np.random.default_rng(0).normal(size=(12, 32)).astype(np.float32)
    np.savez(root / "inputs.npz", x=x)
    (root / "s.py").write_text(SCRIPT)
    quantize_graph.run(QuantizeOptions(str(root / "net.onnx"), root / "Q", "dynamic"))
    return root


def run(root, model="Q", reference="net.onnx", *, data="inputs.npz", samples=16, speed=True, **graph):
    if graph.keys() & {"metric_function", "data_function"}:
        graph["user_script"] = root / "s.py"
    given = None if data is None else str(root / data)
    options = EvaluateOptions(
        str(root / model),
        str(root / reference),
        data=given,
        num_samples=samples,
        speed=speed,
        pair=GraphEvaluationOptions(**graph),
    )
    assert evaluate_graphs.is_graph_pair(options)
    return evaluate_graphs.run(options)


def test_figures_are_those_of_the_sessions(root):
    found = run(root)
    x = np.load(root / "inputs.npz")["x"]
    one, other = (
        np.concatenate([ort.InferenceSession(str(p)).run(None, {"x": row[None]})[0] for row in x]).astype(np.float64)
        for p in (root / "net.onnx", root / "Q" / "model" / "net.onnx")
    )
    (output,) = found.compared.outputs
    assert found.compared.samples == len(x) and output.name == "y"
    assert output.sqnr_db == pytest.approx(10 * np.log10((one**2).sum() / ((one - other) ** 2).sum()), abs=0.01)
    assert output.largest == pytest.approx(np.abs(one - other).max(), rel=1e-5)
    assert output.top1 == (one.argmax(1) == other.argmax(1)).mean()
    assert found.compared.float_ms > 0 and found.compared.quantized_ms > 0
    assert found.size_bytes < found.reference_size_bytes and found.failures == []
    assert run(root, "net.onnx").compared.outputs[0].sqnr_db == 200
    assert run(root, samples=3).compared.samples == 3
    assert run(root, speed=False).to_dict()["float_ms"] is None
    assert run(root, data=None, samples=2).inputs == "made from the graph"


def test_a_metric_of_the_users_own(root):
    found = run(root, metric_function="first", max_loss=0.0)
    ones = {"x": np.ones((1, 32), np.float32)}
    scores = [ort.InferenceSession(str(root / p)).run(None, ones)[0][0, 0] for p in ("net.onnx", "Q/model/net.onnx")]
    assert (found.reference_score, found.score) == tuple(map(float, scores))
    assert found.loss == pytest.approx(found.reference_score - found.score) and found.loss != 0
    turned = run(root, metric_function="first", lower_is_better=True, max_loss=0.0)
    assert turned.loss == -found.loss
    assert len(found.failures) + len(turned.failures) == 1  # worse one way, better the other
    assert run(root, metric_function="first", max_loss=100).failures == []


def test_functions_are_given_what_they_take_by_name(root):
    assert run(root, metric_function="told", batch_size=3).score == len(str(root / "inputs.npz")) + 0.03
    fed = run(root, data_function="samples", batch_size=3)
    assert fed.compared.samples == 6 and fed.inputs.endswith("s.py:samples")
    named = EvaluateOptions(
        str(root / "Q"),
        str(root / "net.onnx"),
        data="here",
        pair=GraphEvaluationOptions(root / "s.py", "samples", "everything", batch_size=2),
    )
    assert evaluate_graphs.run(named).score == 2


def test_a_limit_that_is_not_met(root):
    (failure,) = run(root, min_sqnr=150).failures
    assert failure.startswith("output y ") and failure.endswith("below --min-sqnr 150")
    assert run(root, min_sqnr=0).failures == run(root, min_sqnr=10).failures == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails", r"s\.py:fails on net\.onnx failed: RuntimeError: no such file"),
        ("leaves", r"s\.py:leaves on net\.onnx failed: SystemExit: 0"),
        ("nan", r"s\.py:nan returned nan for .*net\.onnx, expected a finite number"),
        ("text", r"s\.py:text returned str for .*, expected one number"),
        ("many", r"s\.py:many returned ndarray"),
        ("nothing", r"s\.py:nothing returned NoneType"),
    ],
)
def test_functions_that_give_no_number(root, function, message):
    with pytest.raises(InputError, match=message):
        run(root, metric_function=function)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"metric_function": "frist"}, UsageError, r"has no function 'frist', did you mean 'first'\?"),
        ({"data_function": "none"}, InputError, "gives no samples"),
        ({"data_function": "wrong"}, InputError, "x has shape 1x31, the graph takes"),
        ({"data": "nowhere.npz"}, InputError, r"nowhere\.npz has no \.npz files"),
        ({"data": "s.py"}, InputError, r"s\.py is not an \.npz file"),
        ({"image_spec": "size=2x2", "data": None}, UsageError, "--image-spec is for a folder of images"),
        ({"reference": "other.onnx"}, InputError, "other.onnx has no input 'x'|has no input 'images'"),
        ({"reference": "outputs.onnx"}, InputError, r"outputs\.onnx has no output 'y', .*Q/model/net\.onnx has"),
        ({"reference": "wide.onnx"}, InputError, r"input 'x' is float\[n, 32\] in .*, float\[n, 33\] in .*wide\.onnx"),
        ({"reference": "halves.onnx"}, InputError, r"input 'x' is float\[n, 32\] in .*, float16\[n, 32\] in"),
        ({"reference": "gone.onnx"}, InputError, r"gone\.onnx does not exist"),
    ],
)
def test_what_cannot_be_compared(root, given, kind, message):
    for name, shape, input_name, output_name in (
        ("other", ("n", 32), "images", "y"),
        ("outputs", ("n", 32), "x", "z"),
        ("wide", ("n", 33), "x", "y"),
    ):
        b = small_graphs.Builder(*shape)
        b.x.name = input_name
        b.save(root / f"{name}.onnx", b.node("Relu", [b.x], output_name))
    small_graphs.mlp(root / "halves.onnx", half=True)
    with pytest.raises(kind, match=message):
        run(root, **given)


def test_outputs_that_are_not_finite_fall_below_any_limit(root):
    for name, factor in (("fine", 1.0), ("broken", np.inf)):
        b = small_graphs.Builder("n", 32)
        b.save(root / f"{name}.onnx", b.node("Mul", [b.x, b.weight("w", np.full(32, factor, np.float32))], "y"))
    found = run(root, "broken.onnx", "fine.onnx", min_sqnr=1)
    assert found.failures == ["output y not finite where the float graph is, below --min-sqnr 1"]


def test_each_kind_of_model_refuses_the_others_flags(root, tmp_path):
    for given in ({"max_kl": 1.0}, {"seq_len": 8}, {"device": "cpu"}):
        with pytest.raises(UsageError, match=r"is for language models, .*net\.onnx is a graph without"):
            evaluate_graphs.run(EvaluateOptions(str(root / "net.onnx"), "net.onnx", **given))
    with pytest.raises(UsageError, match="it is judged beside its reference"):
        evaluate_graphs.run(EvaluateOptions(str(root / "net.onnx")))
    model = tiny.checkpoint(tmp_path / "model")
    options = EvaluateOptions(str(model), pair=GraphEvaluationOptions(min_sqnr=10))
    assert not evaluate_graphs.is_graph_pair(options)
    with pytest.raises(UsageError, match=r"--min-sqnr is for ONNX graphs that are no language models"):
        evaluate.run(options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric_function": "f"}, "--metric-function needs --user-script"),
        ({"data_function": "f"}, "--data-function needs --user-script"),
        ({"user_script": "s.py"}, "says nothing of which function"),
        ({"max_loss": 0.1}, "--max-loss needs --metric-function"),
        ({"lower_is_better": True}, "--lower-is-better needs --metric-function"),
        ({"user_script": "s.py", "data_function": "f", "image_spec": "size=2x2"}, "exclude each other"),
        ({"min_sqnr": 200.0}, "--min-sqnr is 0 or more and below 200"),
        ({"user_script": "s.py", "metric_function": "f", "max_loss": -1.0}, "--max-loss must be 0 or more"),
        ({"batch_size": 0}, "--batch-size must be 1 or more"),
    ],
)
def test_options_that_cannot_be(given, message):
    with pytest.raises(UsageError, match=message):
        GraphEvaluationOptions(**given)


def test_the_command(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    words = ["evaluate", "-m", "Q", "--reference", "net.onnx", "--data", "inputs.npz", "-q"]
    script = ["--user-script", "s.py", "--metric-function", "first"]
    assert app.run([*words, *script]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Q/model/net.onnx against net.onnx\n")
    for word in ("inputs.npz, 12 samples", "first", "latency", "SQNR", "largest difference", "top-1"):
        assert word in out
    assert app.run([*words, *script, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 12 and found["metric"] == "first" and found["outputs"][0]["name"] == "y"
    assert app.run([*words, "--min-sqnr", "150"]) == 5
    out, err = capsys.readouterr()
    assert "SQNR" in out and err.startswith("error: output y ") and "--min-sqnr 150" in err
    assert app.run([*words, "--max-kl", "1"]) == 2
    assert "--max-kl is for language models" in capsys.readouterr().err


def test_sequences_are_fed_from_the_graph(root):
    """Inputs that no file can hold are made up."""
    x = ir.Value(name="x", type=ir.SequenceType(ir.TensorType(ir.DataType.FLOAT)), shape=ir.Shape([2, 3]))
    node = ir.node("ConcatFromSequence", [x], {"axis": 0})
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17}, name="g")
    ir.save(ir.Model(graph, ir_version=8), root / "sequence.onnx")
    assert run(root, "sequence.onnx", "sequence.onnx", data=None, samples=1).compared.outputs[0].sqnr_db == 200
