"""onnxruntime's own quantizers as a backend; and what configurations become with --backend."""

import json
from dataclasses import replace

import pytest

from quantcli.backends import BACKENDS
from quantcli.backends.graph_methods import ONNXRUNTIME
from quantcli.backends.tiny_models import write_tiny_graph
from quantcli.cli.app import parse, run
from quantcli.errors import QualityError, QuantcliError, UsageError
from quantcli.graphs.model.inspect import read_contents
from quantcli.options import BackendsOptions, GraphOptions, QuantizeOptions
from quantcli.pipelines import backends, quantize


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return write_tiny_graph(tmp_path_factory.mktemp("graph"))


def ask(graph, output, algorithm, **graph_options):
    options = {"min_sqnr": 5.0, **graph_options}
    own = {name: options.pop(name) for name in ("bits", "settings", "group_size", "symmetric") if name in options}
    asked = GraphOptions(**options)
    return quantize.run(QuantizeOptions(str(graph[0]), output, algorithm, "onnxruntime", graph=asked, **own))


def test_check_tries_every_method(monkeypatch):
    some = {name: m for name, m in ONNXRUNTIME.methods.items() if name in ("static", "kquant")}
    monkeypatch.setitem(BACKENDS, "onnxruntime", replace(ONNXRUNTIME, methods=some))
    found = backends.run(BackendsOptions("check", "onnxruntime"))
    checks = found.checks["onnxruntime"]
    assert [c.method for c in checks] == ["static", "kquant"]
    assert all(c.works and "dB" in c.said and c.peak_bytes > 50_000_000 for c in checks), checks
    assert found.failures == []


def test_what_is_kept_of_a_graph(graph, tmp_path):
    made = ask(graph, tmp_path / "O", "rtn", nodes_exclude=("^product0$",), bits=8, group_size=64)
    assert made.outputs.outputs[0].sqnr_db > 30
    operators = read_contents(tmp_path / "O/model/tiny.onnx").operators
    assert (operators["MatMulNBits"], operators["MatMul"]) == (2, 1)
    assert made.kept == {"product0": "left float by onnxruntime"}
    manifest = json.loads((tmp_path / "O/quantcli.json").read_text())
    assert manifest["options"]["backend"] == "onnxruntime"
    assert "onnxruntime: onnxruntime" in manifest["versions"]
    assert sorted(p.name for p in (tmp_path / "O/model").iterdir()) == ["tiny.onnx", "tiny.onnx.data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["O"]


def test_encoding_and_settings_reach_it(graph, tmp_path):
    samples = {"calibration_inputs": graph[1]}
    ask(graph, tmp_path / "a", "static", encoding="qoperator", settings={"per_channel": "true"}, **samples)
    ask(graph, tmp_path / "b", "static", settings={"activation_type": "uint16"}, **samples)
    assert read_contents(tmp_path / "a/model/tiny.onnx").operators["QLinearMatMul"] == 3
    assert read_contents(tmp_path / "b/model/tiny.onnx").operators["DequantizeLinear"] > 3


@pytest.mark.parametrize(
    ("algorithm", "options", "kind", "said"),
    [
        ("static", {}, UsageError, "calibration inputs are needed"),
        ("rtn", {"encoding": "qdq"}, UsageError, "--encoding has no effect"),
        ("rtn", {"bits": 3}, UsageError, "2, 4 or 8 bits, not 3"),
        ("rtn", {"nodes_exclude": ("nobody",)}, UsageError, "matches no node"),
        ("rtn", {"layer_wise": True}, UsageError, "--layer-wise has no effect"),
        ("dynamic", {"group_size": 32}, UsageError, "--group-size has no effect"),
        ("rtn", {"op_types": ("Conv",)}, QuantcliError, "quantized nothing"),
        ("rtn", {"min_sqnr": 60.0}, QualityError, "below 60 dB"),
    ],
)
def test_what_is_refused(graph, tmp_path, algorithm, options, kind, said):
    with pytest.raises(kind, match=said):
        ask(graph, tmp_path / "O", algorithm, **options)
    assert not list(tmp_path.iterdir())


def test_the_command_line(graph, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QUANTCLI_HOME", str(tmp_path / "home"))
    words = ["quantize", "-m", str(graph[0]), "--backend", "onnxruntime", "-o", str(tmp_path / "O")]
    assert run([*words, "-a", "gptq", "--calibration-inputs", str(graph[1]), "--timeout", "0.01s"]) == 4
    assert "error: onnxruntime took longer than 0.01 s and was stopped" in capsys.readouterr().err
    assert run([*words, "-a", "rtn", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["onnxruntime"]
    assert run(["backends"]) == 0
    assert "gptqmodel 7.6.0" in capsys.readouterr().out
    assert run(["backends", "list", "inc"]) == 0
    out = capsys.readouterr().out
    assert "gives what round-to-nearest gives" in out
    assert "not installed" in out
    assert run(["backends", "check", "nvmo"]) == 2
    assert "quantcli backends install nvmo" in capsys.readouterr().err
    assert run(["compare", "-m", str(graph[0]), "--with", "ours"]) == 2


INC = {
    "type": "IncStaticQuantization",
    "approach": "weight_only",
    "weight_only_config": {"bits": 4, "algorithm": "gptq"},
    "data_config": "calib_data_config",
    "calibration_sampling_size": [8],
    "save_as_external_data": True,
    "all_tensors_to_one_file": True,
}
NVMO = {
    "type": "NVModelOptQuantization",
    "algorithm": "awq",
    "tokenizer_dir": "microsoft/Phi-3-mini-4k-instruct",
    "calibration": "awq_lite",
}


@pytest.mark.parametrize(
    ("backend", "config", "method"),
    [
        ("inc", INC, "gptq"),
        ("inc", {"type": "IncDynamicQuantization"}, "dynamic"),
        ("inc", {"type": "IncQuantization", "approach": "static", "reduce_range": True}, "static"),
        ("nvmo", NVMO, "awq_lite"),
        ("nvmo", NVMO | {"calibration": "awq_clip"}, "awq_clip"),
        ("nvmo", {"type": "NVModelOptQuantization", "algorithm": "rtn"}, "rtn_dq"),
        ("nvmo", {"type": "NVModelOptQuantization", "precision": "fp8"}, "fp8"),
        ("nvmo", {"type": "NVModelOptQuantization", "precision": "int8"}, "int8"),
        ("onnxruntime", {"type": "OnnxStaticQuantization", "calibrate_method": "Entropy"}, "static"),
        ("aimet", {"type": "AimetQuantization", "data_config": "c"}, "static"),
        ("aimet", {"type": "AimetQuantization", "techniques": [{"name": "lpbq", "block_size": 64}]}, "lpbq"),
        (
            "aimet",
            {
                "type": "AimetQuantization",
                "precision": "int4",
                "techniques": [{"name": "seqmse", "num_candidates": 20}],
            },
            "seqmse",
        ),
        (
            "aimet",
            {
                "type": "AimetQuantization",
                "techniques": [{"name": "adaround", "num_iterations": 10000, "nodes_to_exclude": ["product2"]}],
            },
            "adaround",
        ),
    ],
)
def test_configurations_mean_the_package_that_is_named(graph, tmp_path, backend, config, method):
    (tmp_path / "pass.json").write_text(json.dumps(config))
    words = ["quantize", "-m", str(graph[0]), "-o", str(tmp_path / "O"), "--backend", backend, "--dry-run", "-q"]
    request = parse([*words, "--config", str(tmp_path / "pass.json"), "--calibration-inputs", str(graph[1])])
    if not BACKENDS[backend].find_method(method)[1].calibrates:
        request = parse([*words, "--config", str(tmp_path / "pass.json")])
    plan = quantize.run(request.options)
    assert (plan.backend.name, plan.name) == (backend, method)
    if config is INC:
        assert (plan.options.bits, plan.options.calibration.num_samples) == (4, 8)
    if method == "lpbq":
        assert plan.options.group_size == 64
    if method == "adaround":
        assert plan.options.graph.nodes_exclude == ("^product2$",)
        assert plan.settings["num_iterations"] == 10000


@pytest.mark.parametrize(
    ("backend", "config", "settings"),
    [
        ("gptqmodel", {"type": "GptqModel", "bits": 4, "group_size": 64, "desc_act": True}, {"order": "desc_act"}),
        ("gptqmodel", {"type": "GptqQuantizer", "desc_act": False, "damp_percent": 0.02}, {"damp_percent": 0.02}),
        (
            "autoawq",
            {"type": "AutoAWQQuantizer", "bits": 4, "version": "gemm", "duo_scaling": False},
            {"duo_scaling": False},
        ),
    ],
)
def test_passes_of_checkpoints_too(tmp_path, backend, config, settings):
    (tmp_path / "pass.json").write_text(json.dumps(config))
    words = ["quantize", "-m", "M", "-o", str(tmp_path / "O"), "--backend", backend, "--dry-run", "-q"]
    plan = quantize.run(parse([*words, "--config", str(tmp_path / "pass.json")]).options)
    assert plan.backend.name == backend
    assert settings.items() <= dict(plan.settings).items()


def test_a_word_of_the_backend_beside_a_configuration(graph, tmp_path):
    (tmp_path / "pass.json").write_text(json.dumps(NVMO))
    words = ["quantize", "-m", str(graph[0]), "-o", str(tmp_path / "O"), "--backend", "nvmo", "--dry-run", "-q"]
    plan = quantize.run(parse([*words, "--config", str(tmp_path / "pass.json"), "-a", "rtn_dq"]).options)
    assert plan.name == "rtn_dq"
