"""What leaves has run beside the float graph: nodes that cost most are float again, or nothing is kept."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest

from onnx_graphs import N, graph_model
from quantcli.cli import app
from quantcli.errors import InputError, QualityError
from quantcli.graphs.checking.side_by_side import GraphRunError, OutputDifference, SideBySide
from quantcli.graphs.model.files import save_graph
from quantcli.pipelines.graph.beside import Gate, Limit, hold_outputs
from quantcli.progress import Silent

WIDTH = 64
RANDOM = np.random.default_rng(0)
CALIBRATED = {"static": ["--calibration-inputs", "samples.npz"], "gptq": ["--calibration-inputs", "samples.npz"]}


def weights():
    """`wild` has a row of weights that no one grid holds beside the others; the row is left out at once."""
    found = {name: RANDOM.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8 for name in ("a", "wild", "b")}
    found["wild"][:, ::2] *= 3e4
    return found | {"keep": np.arange(1, WIDTH, 2)}


NODES = (
    N("MatMul", "x a", "h", "tame"),
    N("MatMul", "h wild", "u", "wild_product"),
    N("Gather", "u keep", "y", "half", {"axis": 1}),
    N("MatMul", "x b", "z", "other"),
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_graph(graph_model(NODES, weights(), outputs="y z"), tmp_path / "m.onnx")
    np.savez(tmp_path / "samples.npz", x=RANDOM.normal(size=(16, WIDTH)).astype(np.float32))
    return tmp_path


def quantize(*words):
    return app.run(["quantize", "-m", "m.onnx", "-o", "out", *words])


def ratios(place, count=64):
    x = np.random.default_rng(5).normal(size=(count, WIDTH)).astype(np.float32)
    one, other = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for path in (place / "m.onnx", place / "out" / "model" / "m.onnx")
    )
    return [10 * np.log10((a**2).sum() / ((b - a) ** 2).sum()) for a, b in zip(one, other, strict=True)]


METHODS = [
    ("static", "--bits", "8"),
    ("dynamic",),
    ("rtn", "--bits", "8", "--group-size", "-1", "--override", "wild=bits=2"),
    ("gptq", "--bits", "8", "--group-size", "-1", "--override", "wild=bits=2"),
]


@pytest.mark.parametrize("words", METHODS, ids=lambda w: w[0])
def test_the_node_that_costs_goes_back_to_float(words, place, capfd):
    flags = [*words[1:], *CALIBRATED.get(words[0], [])]
    limit = [] if words[0] in ("static", "dynamic") else ["--min-sqnr", "20"]
    assert quantize("-a", words[0], *flags, *limit) == 0
    report = json.loads((place / "out" / "report.json").read_text())
    assert [n for n in report["kept"] if "wild" in n] and not [n for n in report["kept"] if n in ("tame", "a", "b")]
    assert min(ratios(place)) > 17
    said = capfd.readouterr()
    assert "wild" in said.err and "dB" in said.out
    assert {o["name"] for o in report["outputs"]["outputs"]} == {"y", "z"}
    manifest = json.loads((place / "out" / "quantcli.json").read_text())
    assert manifest["metrics"]["outputs"] == report["outputs"]


@pytest.mark.parametrize("words", METHODS, ids=lambda w: w[0])
def test_zero_takes_what_comes(words, place):
    assert quantize("-a", words[0], *words[1:], *CALIBRATED.get(words[0], []), "--min-sqnr", "0") == 0
    assert min(ratios(place)) < 20
    assert not [n for n in json.loads((place / "out" / "report.json").read_text())["kept"] if "wild" in n]


@pytest.mark.parametrize("algorithm", ["static", "rtn"])
def test_what_cannot_hold_is_not_kept(algorithm, place, capfd):
    assert quantize("-a", algorithm, "--bits", "4", *CALIBRATED.get(algorithm, []), "--min-sqnr", "150") == 5
    assert not (place / "out").exists() and not [p for p in place.iterdir() if "partial" in p.name]
    assert "below 150 dB" in capfd.readouterr().err


def difference(db):
    return SideBySide((OutputDifference("y", db, 0.0),), 1, None, None)


@pytest.mark.parametrize("needed", range(12))
def test_as_few_as_it_takes(needed):
    order, tried = [f"n{i}" for i in range(13)], []

    def attempt(excluded):
        tried.append(excluded)
        return excluded

    held = hold_outputs(
        attempt,
        lambda: difference(30.0 if len(tried[-1]) >= needed else 1.0),
        lambda _: order,
        lambda *_: order,
        Limit(10.0),
        Silent(),
    )
    assert len(held.returned) == needed and held.made == tuple(held.returned) == tried[-1]
    assert len(tried) <= 30


def test_the_one_that_costs_is_found_wherever_it_stands():
    order = [f"n{i}" for i in range(40)]
    for culprit in order:
        tried = []
        held = hold_outputs(
            lambda excluded, tried=tried: tried.append(excluded),
            lambda tried=tried, culprit=culprit: difference(30.0 if culprit in tried[-1] else 1.0),
            lambda _: order,
            lambda *_: order,
            Limit(10.0),
            Silent(),
        )
        assert list(held.returned) == [culprit] and len(tried) < 30


def test_a_node_that_does_not_run_is_left_float():
    def attempt(excluded):
        if "b.product" not in excluded:
            raise GraphRunError("no kernel for b.product_quant (node b.product_quant)", nodes=("a", "b", "b.product"))
        return excluded

    held = hold_outputs(attempt, lambda: difference(30.0), lambda _: ["a"], lambda *_: [], Limit(10.0), Silent())
    assert list(held.returned) == ["b.product"]


def test_where_no_node_is_named_nothing_is_kept():
    def attempt(excluded):
        raise GraphRunError("out of luck", nodes=("a", "b"))

    with pytest.raises(InputError, match="out of luck"):
        hold_outputs(attempt, lambda: None, lambda _: [], lambda *_: [], Limit(10.0), Silent())


def test_a_limit_that_nothing_meets():
    with pytest.raises(QualityError, match=r"y 1\.0 dB, below 10 dB"):
        hold_outputs(
            lambda e: e, lambda: difference(1.0), lambda _: ["a", "b"], lambda *_: ["a", "b"], Limit(10.0), Silent()
        )


def test_faster_leaves_float_what_is_timed_slower(place, capfd):
    """Sixteen small elementwise nodes cost conversions in integers, and nothing in float."""
    nodes = [N("MatMul", "x a", "t0", "product")]
    nodes += [N("Add", f"t{i} x", f"t{i + 1}", f"add{i}") for i in range(16)]
    save_graph(graph_model([*nodes, N("Relu", "t16", "y", "last")], {"a": weights()["a"]}), place / "m.onnx")
    assert quantize("-a", "static", *CALIBRATED["static"], "--faster") == 0
    report = json.loads((place / "out" / "report.json").read_text())
    slow = {name for name, why in report["kept"].items() if why == "faster in float here"}
    assert "faster in float: " in capfd.readouterr().err
    held = {n.name for n in onnx.load(place / "out" / "model" / "m.onnx").graph.node}
    assert {n for n in slow if f"{n}_quant" in held} == set()
    assert report["outputs"]["float_ms"] > 0


@pytest.mark.parametrize("asked", [(), ("--weight-type", "uint8"), ("--bits", "8")])
def test_faster_says_the_type_of_weights_that_it_took(asked, place, capfd):
    """Which one is faster depends on the processor; the report and the graph agree, and what was asked for stays."""
    wide = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    nodes = [N("MatMul", "x a", "h", "p"), *(N("MatMul", f"{x} b", y, f"p{y}") for x, y in ("ht", "tu", "uy"))]
    first = np.random.default_rng(1).normal(size=(WIDTH, 512)).astype(np.float32)
    save_graph(graph_model(nodes, {"a": first, "b": wide}), place / "m.onnx")
    assert quantize("-a", "dynamic", *asked, "--faster", "--min-sqnr", "0") == 0
    told = json.loads((place / "out" / "report.json").read_text())["plan"]["settings"]["weight_type"]
    held = {t.data_type for t in onnx.load(place / "out" / "model" / "m.onnx").graph.initializer if len(t.dims) == 2}
    kind = onnx.TensorProto.INT8 if told == "int8" else onnx.TensorProto.UINT8
    assert kind in held and len(held - {onnx.TensorProto.FLOAT}) == 1
    assert ("faster with int8 weights" in capfd.readouterr().err) == (told == "int8")
    assert told == "uint8" or not asked


@pytest.mark.parametrize("words", [("-a", "rtn", "--faster"), ("-a", "static", "--min-sqnr", "-1")])
def test_flags_without_effect_are_refused(words, place):
    assert quantize(*words, *(CALIBRATED["static"] if "static" in words else [])) == 2


def test_a_float_graph_that_gives_no_numbers_is_said_to(place, capfd):
    nodes = [N("MatMul", "x a", "h", "p"), N("Add", "h bias", "y", "add")]
    bias = np.zeros(WIDTH, np.float32)
    bias[3] = np.nan
    save_graph(graph_model(nodes, {"a": weights()["a"], "bias": bias}), place / "m.onnx")
    assert quantize("-a", "rtn") == 0
    assert "weight 'bias' holds NaN" in capfd.readouterr().err


@pytest.mark.parametrize("reachable", [True, False])
def test_a_goal_behind_the_outputs(reachable, tmp_path):
    """The outputs need two nodes in float, the goal one more or what cannot be had; then the outputs' two stay."""
    order, tried = [f"n{i}" for i in range(9)], []

    def missing(written):
        return None if reachable and len(tried[-1]) >= 3 else "accuracy is 0.5"

    held = hold_outputs(
        lambda excluded: tried.append(excluded) or excluded,
        lambda: difference(30.0 if len(tried[-1]) >= 2 else 1.0),
        lambda _: order,
        lambda *_: order,
        Limit(10.0, Gate(missing, "accuracy>=0.9"), tmp_path),
        Silent(),
    )
    assert len(held.returned) == (3 if reachable else 2) and held.made == tuple(held.returned) == tried[-1]
