"""Pass configurations that users bring along, run as they are written on tiny models.

`pass_configurations.md` has them. A run adds the model, the output and, where a configuration names data that nobody
defined, the flag that says where the data is.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import small_graphs
import tiny
from quantcli.cli import app
from quantcli.cli.app import parse
from quantcli.folder import read_manifest
from quantcli.graphs.model.files import open_graph
from quantcli.pipelines.planning.decide import make_plan

BLOCKS = re.findall(
    r"^```json\n(.*?)^```$", Path(__file__).with_name("pass_configurations.md").read_text(), re.DOTALL | re.MULTILINE
)


def where(text, count=1):
    """The numbers of the blocks that hold a text."""
    found = [number for number, block in enumerate(BLOCKS) if text in block]
    assert len(found) == count, text
    return found


GPTQ, AWQ, TUNED = where("GptqQuantizer", 2), where("AutoAWQQuantizer", 2), where("SEARCHABLE_VALUES")
(QUAROT,), (SPINQUANT,), (W4A4KV4,) = where('"hadamard"\n'), where("SpinQuant"), where('"w_rtn": true')
(RTN,), (HQQ,) = where("OnnxBlockWiseRtnQuantization"), where("OnnxHqqQuantization")
(INC,), (NVMO,) = where("IncStaticQuantization"), where("NVModelOptQuantization")
STATIC = [n for n in where("OnnxQuantization", 4) if n not in TUNED]
AIMET = where("AimetQuantization", 4)
BASIC = [n for n in AIMET if "techniques" not in BLOCKS[n]]
TEXT = ["--num-samples", "8", "--seq-len", "64"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A checkpoint `m`, the graph `f` captured from it, a `cnn.onnx` with its samples, text, and the blocks."""
    folder = tmp_path_factory.mktemp("configurations")
    tiny.checkpoint(folder / "m", tie_word_embeddings=False)
    assert app.run(["capture-onnx-graph", "-m", str(folder / "m"), "-o", str(folder / "f"), "-q"]) == 0
    small_graphs.cnn(folder / "cnn.onnx")
    (folder / "samples").mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        x = random.normal(size=(1, 3, 12, 12)).astype(np.float32)
        np.savez(folder / "samples" / f"{number}.npz", x=x)
    (folder / "cal.txt").write_text(tiny.words(4000))
    for number, block in enumerate(BLOCKS):
        (folder / f"{number}.json").write_text(block)
    return folder


@pytest.fixture
def run(root, tmp_path, capsys):
    """Runs a block on a model; the output folder and what was said."""

    def run(number, model, *words, code=0):
        output = tmp_path / "out"
        args = ["quantize", "-m", root / model, "-o", output, "--config", root / f"{number}.json", *words]
        capsys.readouterr()
        assert app.run([str(word) for word in args]) == code
        return output, capsys.readouterr().err

    return run


def options(folder):
    return read_manifest(folder).options


def bits(folder):
    return {layer["bits"] for layer in json.loads((folder / "report.json").read_text())["layers"]}


def test_no_block_is_forgotten():
    named = [*GPTQ, *AWQ, *TUNED, QUAROT, SPINQUANT, W4A4KV4, RTN, HQQ, INC, NVMO, *STATIC, *AIMET]
    assert sorted(named) == list(range(19)) == list(range(len(BLOCKS)))


@pytest.mark.parametrize("number", GPTQ)
def test_gptq(number, root, run):
    output, said = run(number, "m", "--data", root / "cal.txt", *TEXT)
    assert (options(output)["algorithm"], bits(output)) == ("gptq", {4})
    assert "says -a gptq" in said
    _, said = run(number, "m", "--force", code=2)
    assert "names 'wikitext2_train', which is not defined here" in said
    assert "hint: add --data FILE" in said


@pytest.mark.parametrize("number", AWQ)
def test_awq_on_text_that_the_model_writes(number, run):
    output, _ = run(number, "m", *TEXT)
    assert (options(output)["algorithm"], bits(output)) == ("awq", {4})


def test_quarot_and_spinquant_alone_write_float_models(root, run):
    output, _ = run(QUAROT, "m")
    assert options(output)["settings"] == {"rotate_mode": "hadamard"}
    assert bits(output) == set()
    output, _ = run(SPINQUANT, "m", "--data", root / "cal.txt", *TEXT, "--set", "steps=2", "--force")
    assert options(output)["settings"] == {"rotate_mode": "hadamard", "a_bits": "8", "steps": "2"}
    assert options(output)["algorithm"] == "spinquant"


def test_quarot_with_four_bits_for_everything(root, run, capsys):
    """Weights are stored in 4 bits, the rest is simulated when the result is scored; manifest and evaluate say so."""
    output, said = run(W4A4KV4, "m")
    made = options(output)
    assert (made["algorithm"], made["bits"], bits(output)) == ("quarot,rtn", 4, {4})
    assert [made["simulation"][f"{name}_bits"] for name in "akv"] == [4, 4, 4]
    text = (root / f"{W4A4KV4}.json").read_bytes()
    assert made["config"] == {"name": f"{W4A4KV4}.json", "sha256": hashlib.sha256(text).hexdigest()}
    assert "simulating activations 4 bits sym per token" in said
    assert "keys 4 bits asym" in said and "values 4 bits asym" in said
    assert app.run(["evaluate", "-m", str(output), "--no-speed", "--num-samples", "1", "--seq-len", "16"]) == 0
    assert "made for activations or cache of few bits: --a-bits 4 --k-bits 4 --v-bits 4" in capsys.readouterr().err


def test_a_file_and_the_same_flags_continue_each_other(root):
    """What an interrupted run is known by holds what was said, not where."""
    begin = ["quantize", "-m", str(root / "m"), "-o", str(root / "never")]
    said = parse([*begin, "-c", str(root / f"{AWQ[0]}.json")]).options
    typed = parse([*begin, "-a", "awq", "--bits", "4"]).options
    assert said.config is not None and typed.config is None
    assert make_plan(said).identity() == make_plan(typed).identity()


def test_blockwise_rtn_and_hqq_of_a_graph(run):
    output, _ = run(RTN, "f")
    kinds = {n.op_type for n in open_graph(output / "model" / "model.onnx").graph}
    assert {"MatMulNBits", "GatherBlockQuantized"} <= kinds
    output, _ = run(HQQ, "f", "--force")
    kinds = {n.op_type for n in open_graph(output / "model" / "model.onnx").graph}
    assert "MatMulNBits" in kinds and "GatherBlockQuantized" not in kinds


@pytest.mark.parametrize("number", [*STATIC, *BASIC])
def test_static_quantization(number, root, run):
    output, said = run(number, "cnn.onnx", code=2)
    assert "names 'calib_data_config', which is not defined here" in said
    assert "hint: add --calibration-inputs FOLDER" in said
    output, said = run(number, "cnn.onnx", "--calibration-inputs", root / "samples")
    assert options(output)["algorithm"] == "static"
    assert options(output)["settings"] == ({"per_channel": "true"} if ": true" in BLOCKS[number] else {})
    assert "QuantizeLinear" in {n.op_type for n in open_graph(output / "model" / "cnn.onnx").graph}
    session = onnxruntime.InferenceSession(output / "model" / "cnn.onnx")
    assert session.run(None, {"x": np.zeros((1, 3, 12, 12), np.float32)})[0].shape == (1, 10)


def test_what_asks_for_a_search_is_one_of_tune(root, run):
    """quantize names the command that searches; that runs the block as it is written, one value after the other."""
    output, said = run(*TUNED, "cnn.onnx", "--calibration-inputs", root / "samples", code=2)
    assert '"per_channel" asks for a search' in said and "hint: use `quantcli tune`" in said
    assert not output.exists()
    found = tuned(*TUNED, root, "per-channel")
    assert [t["point"] for t in found["trials"]] == [{"per_channel": False}, {"per_channel": True}]
    assert all(t["state"] == "complete" for t in found["trials"])


def tuned(number, root, name, *words):
    """What `tune` wrote of a block on the network of convolutions."""
    (root / f"{name}.json").write_text(BLOCKS[number])
    given = ["tune", "-m", root / "cnn.onnx", "-o", root / name, "-c", root / f"{name}.json", "-q", *words]
    assert app.run([str(w) for w in (*given, "--calibration-inputs", root / "samples")]) == 0
    return json.loads((root / name / "tuning.json").read_text())


@pytest.mark.parametrize("number", STATIC)
def test_nothing_chosen_searches_what_is_documented(number, root):
    """Of the three blocks without SEARCHABLE_VALUES, the one that chooses nothing searches all that has values."""
    found = tuned(number, root, f"block-{number}", "--trials", "3")
    chosen = {name for t in found["trials"] for name in t["point"]}
    if "per_channel" in BLOCKS[number]:
        assert chosen == set() and len(found["trials"]) == 1
    else:
        assert {"quant_mode", "weight_type", "per_channel", "reduce_range"} <= chosen and len(found["trials"]) == 3


def test_weights_alone_by_inc(root, run):
    output, said = run(INC, "f", "--data", root / "cal.txt", "--seq-len", "64")
    made = options(output)
    assert (made["algorithm"], made["bits"], made["calibration"]["num_samples"]) == ("gptq", 4, 8)
    assert '"save_as_external_data" has nothing to do' in said


def test_awq_of_a_graph_by_its_other_name(root, run):
    output, _ = run(NVMO, "f", "--data", root / "cal.txt", *TEXT)
    assert options(output)["algorithm"] == "awq,rtn"


@pytest.mark.parametrize("technique", ["lpbq", "seqmse", "adaround"])
def test_techniques_that_are_not_here(technique, root, run):
    (number,) = where(f'"name": "{technique}"')
    output, said = run(number, "cnn.onnx", "--calibration-inputs", root / "samples", code=2)
    assert f"{technique} is not in quantcli yet" in said and "hint:" in said
    assert not output.exists()
