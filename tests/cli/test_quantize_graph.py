"""`quantcli quantize` on ONNX graphs: whole command lines on a tiny language model and on a graph of three products."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tiny
from onnx_graphs import N, graph_model
from quantcli.cli import app
from quantcli.folder import read_manifest
from quantcli.graphs.model.files import open_graph, save_graph

SEQ = ["--seq-len", "64", "--num-samples", "24"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A captured language model `f`, its checkpoint `m`, text to calibrate and to evaluate on."""
    folder = tmp_path_factory.mktemp("graphs")
    tiny.checkpoint(folder / "m", tie_word_embeddings=False)
    (folder / "cal.txt").write_text(tiny.words(8000))
    (folder / "eval.txt").write_text(tiny.words(3000, 50000))
    assert run("capture-onnx-graph", "-m", folder / "m", "-o", folder / "f", "-q") == 0
    return folder


@pytest.fixture
def net(tmp_path):
    """A graph of three products in a file of its own."""
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((64, 64)).astype(np.float32) for name in "abc"}
    nodes = [N("MatMul", "x a", "h", "/one/MatMul"), N("Relu", "h", "r", "relu")]
    nodes += [N("MatMul", "r b", "g", "/two/MatMul"), N("MatMul", "g c", "y", "/head/MatMul")]
    save_graph(graph_model(nodes, weights), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def run(*words):
    return app.run([str(word) for word in words])


def kl(root, name, capsys):
    words = ["--data", root / "eval.txt", "--seq-len", "64", "--num-samples", "8", "--no-speed", "-q", "--json"]
    capsys.readouterr()
    assert run("evaluate", "-m", root / name, "--reference", root / "f", *words) == 0
    return json.loads(capsys.readouterr().out)["kl_mean"]


def test_a_language_model_on_text(root, capsys):
    """gptq's statistics of text bring the folder clearly closer to the float graph than rtn."""
    common = ["-m", root / "f", "--bits", "3", "--group-size", "32"]
    text = ["--data", root / "cal.txt", *SEQ]
    assert run("quantize", *common, "-o", root / "rtn", "-a", "rtn", "-q") == 0
    assert run("quantize", *common, "-o", root / "awq", "-a", "awq,gptq", *text, "-q") == 0
    capsys.readouterr()
    assert run("quantize", *common, "-o", root / "gptq", "-a", "gptq", *text) == 0
    out, err = capsys.readouterr()
    assert "3 bits lie in 4-bit containers" in err
    assert f"{root / 'cal.txt'}, 24 rows of 64 tokens" in err
    kinds = [line.split()[0] for line in out.splitlines()[1:-2]]
    assert kinds == ["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    assert "5.13 bits per weight that hold 4.13" in out
    names = {p.name for p in (root / "f" / "model").iterdir()}
    assert {p.name for p in (root / "gptq" / "model").iterdir()} == names
    rtn, gptq, awq = (kl(root, name, capsys) for name in ("rtn", "gptq", "awq"))
    assert gptq < 0.85 * rtn
    assert awq < 0.85 * rtn


def test_inspect_shows_bits_and_history(root, capsys):
    assert run("quantize", "-m", root / "f", "-o", root / "three", "-a", "rtn", "--bits", "3", "-q") == 0
    capsys.readouterr()
    assert run("inspect", root / "three", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in found["histogram"]] == ["3-bit", "float32"]
    assert found["intact"] and [step["command"] for step in found["history"]] == ["quantize", "capture-onnx-graph"]
    assert 4.5 < found["quantized_bits_per_weight"] < 4.8  # stored, scales and zero points included


def test_dry_run_writes_nothing(root, capsys):
    words = ["-m", root / "f" / "model" / "model.onnx", "-o", root / "never", "-a", "gptq", "--dry-run", *SEQ]
    assert run("quantize", *words) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "Plan (nothing was done)"
    assert "Python's documentation, 24 rows of 64 tokens" in out
    assert run("quantize", *words, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["matrices"], plan["encoding"], plan["algorithm"]) == (11, "nbits", "gptq")
    assert not (root / "never").exists()


def test_evaluate_of_the_run(root, capsys):
    assert run("quantize", "-m", root / "f", "-o", root / "judged", "-a", "kquant", "--evaluate", "--json", "-q") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["evaluation"]["kl_mean"] < 0.01
    assert len(result["layers"]) == 11


def test_a_file_alone_in_the_folder_that_is_written_to(net, monkeypatch, capsys):
    monkeypatch.chdir(net.parent)
    assert run("quantize", "-m", "net.onnx", "-o", "out", "-a", "rtn", "--group-size", "32") == 0
    assert sorted(p.name for p in Path("out/model").iterdir()) == ["net.onnx", "net.onnx.data"]
    kinds = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-2]]
    assert kinds == ["a", "b", "c"]
    assert read_manifest(Path("out")).parent["name"] == "net.onnx"
    assert run("quantize", "-m", "net.onnx", "-o", "out", "-a", "rtn", "--group-size", "32") == 2
    assert "is not empty" in capsys.readouterr().err
    assert run("quantize", "-m", "net.onnx", "-o", "out", "-a", "rtn", "--bits", "8", "--force", "-q") == 0
    assert sorted(p.name for p in Path().iterdir()) == ["net.onnx", "net.onnx.data", "out"]


def test_flags_reach_the_graph(net, tmp_path):
    words = ["--nodes-include", "one|head", "--nodes-exclude", "/one/MatMul", "--accuracy-level", "4", "-q"]
    assert run("quantize", "-m", net, "-o", tmp_path / "out", "-a", "rtn", *words) == 0
    nodes = {n.op_type: n for n in open_graph(tmp_path / "out" / "model" / "net.onnx").graph}
    assert nodes["MatMulNBits"].attributes["accuracy_level"].as_int() == 4
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept"] == {"a": "excluded", "b": "not among the included nodes"}
    assert run("quantize", "-m", net, "-o", tmp_path / "qdq", "-a", "rtn", "--encoding", "qdq", "-q") == 0
    assert any(n.op_type == "DequantizeLinear" for n in open_graph(tmp_path / "qdq" / "model" / "net.onnx").graph)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target-bits", "3.5"], "--target-bits is for checkpoints, this is an ONNX graph"),
        (["--quantize-embeddings"], "add Gather to --op-types"),
        (["--format", "awq"], "use --encoding nbits or qdq"),
        (["--dtype", "float16"], "--dtype is for checkpoints"),
        (["--device", "cpu"], "graphs are run on the CPU"),
        (["-a", "rtn", "--evaluate"], "no genai_config.json beside it"),
        (["-a", "rtn", "--seq-len", "9"], "rtn uses no calibration inputs"),
        (["-a", "rtn", "--trust-remote-code"], "none is read here"),
        (["-a", "gptq", "--data", "builtin"], "no text can be made into"),
        (["-a", "nf5"], "unknown algorithm 'nf5'"),
        (["-a", "quarot,gptq"], "quarot does not apply to ONNX graphs"),
        (["-a", "rtn", "--bits", "1"], "rtn makes 2, 3, 4, 5, 6, 7, 8 bits, not 1"),
        (["--quantize-lm-head", "--no-quantize-last-matmul"], "exclude each other"),
        (["-a", "rtn", "--nodes-include", "nothing"], "has no weight to quantize"),
    ],
)
def test_what_graphs_do_not_have_is_refused(words, message, net, tmp_path, capsys):
    assert run("quantize", "-m", net, "-o", tmp_path / "out", *words) in (2, 3)
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoding", "qdq"], "--encoding is for ONNX graphs"),
        (["--accuracy-level", "4"], "--accuracy-level is for ONNX graphs"),
        (["--no-quantize-last-matmul"], "the output head stays float anyway"),
        (["--op-types", "MatMul"], "--op-types is for ONNX graphs"),
        (["--calibration-inputs", "x"], "--calibration-inputs is for ONNX graphs"),
    ],
)
def test_what_checkpoints_do_not_have_is_refused(words, message, root, capsys):
    assert run("quantize", "-m", root / "m", "-o", root / "never", "-a", "rtn", *words) == 2
    assert message in capsys.readouterr().err
    assert not (root / "never").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "self"], "a graph does not write its own text"),
        (["--seq-len", "256"], "add --seq-len 128"),
        (["--calibration-inputs", "x", "--seq-len", "64"], "exclude each other"),
    ],
)
def test_text_that_a_graph_cannot_be_given(words, message, root, capsys):
    assert run("quantize", "-m", root / "f", "-o", root / "never", "-a", "gptq", *words) == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(root, tmp_path):
    """Interrupted while it gathers statistics, a run ends with 130 and no file."""
    words = ["-m", str(root / "f"), "-o", str(tmp_path / "out"), "-a", "gptq", "--data", str(root / "cal.txt")]
    words += ["--seq-len", "8", "--num-samples", "1000000"]
    code = "import sys; from quantcli.cli.app import main; main(sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", code, "quantize", *words], stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": SRC}
    ) as process:
        work = tmp_path / "out.partial-work" / "model"
        while not work.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert list(tmp_path.iterdir()) == []


SRC = str(Path(__file__).resolve().parents[2] / "src")
