"""What `quantcli quantize` cannot take: one clear line, a hint, the right exit code, and nothing left behind."""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

import tiny
from quantcli.cli import app
from quantcli.formats.codecs import CODECS
from quantcli.models.checkpoint import INDEX

USAGE, INPUT, RESOURCE = 2, 3, 4
CALIBRATED = ("-a", "gptq", "--num-samples", "4", "--seq-len", "16", "--group-size", "32")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path):
    return tiny.checkpoint(tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(tiny.words(400))
    return tmp_path / "text.txt"


class Refusal:
    """How a command line was refused."""

    def __init__(self, code, error, hint):
        self.code, self.error, self.hint = code, error, hint


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a command line that must be refused with one line and perhaps a hint, and must not touch the disk."""

    def run(model, *args, output=None):
        before = tiny.digests(tmp_path)
        output = output or tmp_path / "out"
        default = () if "-a" in args or "--algorithm" in args or "--preset" in args else ("-a", "rtn")
        capsys.readouterr()
        code = app.run(["quantize", "-m", str(model), "-o", str(output), "-q", *default, *map(str, args)])
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert [line.split(":")[0] for line in lines] in (["error"], ["error", "hint"]), err
        assert len(lines[0]) < 600
        after = {name: digest for name, digest in tiny.digests(tmp_path).items() if not name.startswith("cache/")}
        assert after == before  # the input is as it was, no output, nothing half-written
        assert not list(tmp_path.rglob("*.partial-*"))
        return Refusal(code, lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ") if lines[1:] else None)

    return run


# -- not a model ------------------------------------------------------------------------------------------------------


def test_missing_folder(refused, tmp_path):
    end = refused(tmp_path / "nowhere")
    assert end.code == INPUT and end.hint
    assert end.error == f"model folder {tmp_path / 'nowhere'} does not exist"


def test_name_that_is_neither_a_folder_nor_in_the_hub_cache(refused):
    end = refused("nobody/nothing-of-the-kind")
    assert end.code == INPUT and end.hint
    assert end.error.startswith("nobody/nothing-of-the-kind is neither a folder nor a model that the hub")


def test_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    end = refused(tmp_path / "empty")
    assert end.code == INPUT and end.hint
    assert "no config.json (it is empty)" in end.error


def test_folder_of_other_things_says_what_was_found(refused, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"\xff\xd8")
    end = refused(folder)
    assert end.code == INPUT
    assert "no config.json (found cat.jpg)" in end.error


def test_file_instead_of_a_folder(refused, text):
    end = refused(text)
    assert end.code == INPUT
    assert "is a file, expected a model folder" in end.error


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00", '"text"', "null"])
def test_config_that_is_no_json_object(refused, model, content):
    (model / "config.json").write_text(content)
    end = refused(model)
    assert end.code == INPUT and "config.json" in end.error


def test_config_without_model_type(refused, model):
    tiny.edit_json(model / "config.json", model_type=None)
    assert "names no model_type" in refused(model).error


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "wide"},
        {"hidden_size": -64},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
        {"vocab_size": 1.5},
        {"rope_parameters": {"rope_type": "unknown"}},
        {"hidden_act": "no such function"},
        {"dtype": "float7"},
    ],
    ids=lambda v: next(iter(v)),
)
def test_config_values_that_cannot_be(refused, model, values):
    found = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(found | values))
    end = refused(model)
    assert end.code == INPUT and str(model) in end.error


def test_config_without_weights(refused, model):
    (model / "model.safetensors").unlink()
    end = refused(model)
    assert end.code == INPUT
    assert "holds no safetensors weights (found config.json" in end.error


def test_encoder_only_model(refused, tmp_path):
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    for kind in (transformers.BertModel, transformers.BertForMaskedLM):
        folder = tmp_path / kind.__name__
        kind(config).save_pretrained(folder)
        end = refused(folder)
        assert end.code == INPUT
        assert f"holds a {kind.__name__}; a decoder-only language model" in end.error


def test_encoder_decoder_model(refused, tmp_path):
    config = transformers.T5Config(
        vocab_size=200, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    end = refused(tmp_path / "t5")
    assert end.code == INPUT
    assert "holds a T5ForConditionalGeneration; a decoder-only language model" in end.error


def test_unknown_architecture(refused, model):
    tiny.edit_json(model / "config.json", model_type="not_yet_invented")
    end = refused(model)
    assert end.code == INPUT and "'not_yet_invented' is not known" in end.error


def test_remote_code_is_not_run_unasked(refused, model):
    (model / "code.py").write_text("raise SystemExit('it ran')\n")
    tiny.edit_json(
        model / "config.json", model_type="own", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    )
    end = refused(model)
    assert end.code == INPUT
    assert end.error == "own brings its own model code, which is not run unasked"
    assert "--trust-remote-code" in end.hint


def test_no_linear_layers(refused, tmp_path):
    folder = tiny.checkpoint(tmp_path / "bare", num_hidden_layers=0)
    end = refused(folder)
    assert end.code == INPUT and "no linear layers" in end.error


READ = "tensors of float32, float16, bfloat16 or float64 are read"


def test_already_quantized(refused, model, tmp_path, capsys):
    assert app.run(["quantize", "-m", str(model), "-o", str(tmp_path / "Q"), "-a", "rtn", "-q"]) == 0
    end = refused(tmp_path / "Q")
    assert end.code == INPUT
    assert end.error == f"{tmp_path / 'Q' / 'model'} is already quantized (gptq); " + READ
    assert "original" in end.hint
    tiny.edit_json(tmp_path / "Q" / "model" / "config.json", quantization_config=None)
    assert "already quantized (packed weights)" in refused(tmp_path / "Q").error


@pytest.mark.parametrize("name", [n for n, c in CODECS.items() if c.unpack and c.layout is None and n != "gguf"])
def test_already_quantized_in_each_format(refused, model, tmp_path, name):
    algorithm = {"bnb": "nf4", "bnb-int8": "llm-int8"}.get(name, "rtn")
    args = ["-m", str(model), "-o", str(tmp_path / "Q"), "-a", algorithm, "--format", name, "-q"]
    args += (
        ["--data", "builtin", "--num-samples", "1", "--seq-len", "8"] if name == "bnb-int8" else ["--group-size", "32"]
    )
    assert app.run(["quantize", *args]) == 0
    method = json.loads((tmp_path / "Q" / "model" / "config.json").read_text())["quantization_config"]["quant_method"]
    end = refused(tmp_path / "Q")
    assert end.code == INPUT and f"is already quantized ({method})" in end.error
    tiny.edit_json(tmp_path / "Q" / "model" / "config.json", quantization_config=None)
    assert "already quantized (packed weights)" in refused(tmp_path / "Q").error


@pytest.mark.parametrize("method", ["olive", "hqq", "quark"])
def test_already_quantized_by_another_tool(refused, model, method):
    tiny.edit_json(model / "config.json", quantization_config={"quant_method": method, "bits": 4})
    assert f"is already quantized ({method})" in refused(model).error


# -- damaged or hostile weights ---------------------------------------------------------------------------------------


def rewrite_header(path: Path, change) -> None:
    """Lets `change` alter the header of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    changed = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])


def weights(model: Path) -> Path:
    return model / "model.safetensors"


Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda data: b"", "too few"),
        (lambda data: data[:5], "too few"),
        (lambda data: data[:-100], "ends at byte"),
        (lambda data: data[: len(data) // 2], "ends at byte"),
        (lambda data: struct.pack("<Q", 1 << 60) + data[8:], "header length 1152921504606846976 exceeds"),
        (lambda data: struct.pack("<Q", len(data) - 8) + data[8:], "header cannot be read"),
        (lambda data: struct.pack("<Q", 10) + data[8:], "header cannot be read"),
        (lambda data: b"PK\x03\x04" + data[4:], "header length"),
        (lambda data: data[:8] + b"[" * 5000 + data[5008:], "header cannot be read"),
        (lambda data: struct.pack("<Q", 2) + b"[]" + data[8:], "header cannot be read"),
        (lambda data: struct.pack("<Q", 7) + b'{"a":1}' + data[8:], "header cannot be read"),
    ],
)
def test_garbled_file(refused, model, damage, why):
    weights(model).write_bytes(damage(weights(model).read_bytes()))
    end = refused(model)
    assert end.code == INPUT and end.hint
    assert end.error.startswith(f"{weights(model)} is damaged: ") and why in end.error


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda h: h[Q].update(dtype="F13"), f"tensor {Q} has unknown dtype 'F13'"),
        (lambda h: h[Q].update(dtype=["F32"]), f"tensor {Q} has unknown dtype"),
        (lambda h: h[Q].update(dtype="F16"), f"tensor {Q} of shape [64, 64] and dtype F16 does not take"),
        (lambda h: h[Q].update(shape=[64, -64]), f"tensor {Q} has shape [64, -64]"),
        (lambda h: h[Q].update(shape="64"), f"tensor {Q} has shape"),
        (lambda h: h[Q].update(shape=[1 << 40, 1 << 40]), f"tensor {Q} of shape"),
        (lambda h: h[Q].update(data_offsets=h[K]["data_offsets"]), f"tensor {Q} of shape"),
        (lambda h: h[Q].update(data_offsets=[5]), f"tensor {Q} has offsets"),
        (lambda h: h[Q].update(data_offsets=[-4, 16380]), f"tensor {Q} has offsets"),
        (lambda h: h[Q].update(data_offsets=[10**9, 10**9 + 16384]), "ends at byte"),
        (lambda h: h[Q].update(data_offsets=[o + 4 for o in h[Q]["data_offsets"]]), "overlap"),
        (lambda h: h[Q].pop("shape"), "header cannot be read (KeyError)"),
    ],
)
def test_header_that_contradicts_the_file(refused, model, change, why):
    rewrite_header(weights(model), lambda h: change(h) and None)
    end = refused(model)
    assert end.code == INPUT and end.hint
    assert "is damaged: " in end.error and why in end.error


@pytest.mark.parametrize("args", [("-a", "rtn"), (*CALIBRATED, "--data", "text.txt")], ids=["rtn", "gptq"])
def test_shape_that_the_config_contradicts(refused, model, text, args):
    tiny.edit_weights(model, lambda t: t.update({Q: torch.zeros(64, 32)}))
    end = refused(model, *args)
    assert end.code == INPUT
    assert Q in end.error or "self_attn.q_proj.weight" in end.error
    assert "[64, 32]" in end.error and "[64, 64]" in end.error


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
@pytest.mark.parametrize("args", [("-a", "rtn"), (*CALIBRATED, "--data", "text.txt")], ids=["rtn", "gptq"])
def test_shape_of_a_norm_that_the_config_contradicts(refused, model, text, args, name):
    tiny.edit_weights(model, lambda t: t.update({name: torch.ones(65)}))
    end = refused(model, *args)
    assert end.code == INPUT
    assert name.rsplit(".", 2)[-2] in end.error and "[65]" in end.error


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("args", [("-a", "rtn"), (*CALIBRATED, "--data", "text.txt")], ids=["rtn", "gptq"])
def test_weight_of_a_dtype_that_holds_no_weights(refused, model, text, dtype, args):
    tiny.edit_weights(model, lambda t: t.update({Q: torch.ones(64, 64).to(dtype)}))
    end = refused(model, *args)
    assert end.code == INPUT and Q in end.error and str(dtype).removeprefix("torch.") in end.error


@pytest.mark.parametrize("name", [Q, "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("args", [("-a", "rtn"), (*CALIBRATED, "--data", "text.txt")], ids=["rtn", "gptq"])
def test_missing_tensor(refused, model, text, name, args):
    tiny.edit_weights(model, lambda t: t.pop(name))
    end = refused(model, *args)
    assert end.code == INPUT and f"tensor {name} is missing from {model}" in end.error


def test_tensors_that_the_model_has_no_place_for_are_named(refused, model):
    tiny.edit_weights(model, lambda t: t.update({f"model.extra.{i}.weight": torch.ones(8, 8) for i in range(12)}))
    end = refused(model)
    assert end.code == INPUT and "model.extra.9.weight and 2 more" in end.error and "model.extra.0.weight" in end.error


def test_missing_tensors_are_named_the_first_ten(refused, model):
    gone = [f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("gate", "up", "down")]
    gone += [f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "qkvo"]
    tiny.edit_weights(model, lambda t: [t.pop(name) for name in gone])
    end = refused(model)
    assert end.code == INPUT and "and 4 more" in end.error and sum(name in end.error for name in gone) == 10


@pytest.mark.parametrize(("written", "newer"), [("99.1.0", True), ("4.30.0", False), (None, False)])
def test_configuration_of_a_newer_transformers(refused, model, written, newer):
    tiny.edit_json(model / "config.json", model_type="llama99", transformers_version=written)
    end = refused(model)
    assert end.code == INPUT and transformers.__version__ in end.error
    assert ("written by 99.1.0" in end.error) == newer == ("99.1.0" in (end.hint or ""))


def test_an_empty_auto_map_is_none(model, tmp_path):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": None}))
    assert app.run(["quantize", "-m", str(model), "-o", str(tmp_path / "Q"), "-a", "rtn", "-q"]) == 0


def test_rows_longer_than_the_learned_positions(refused, tmp_path, text, capsys):
    model = tiny.checkpoint(tmp_path / "gpt2", "gpt2", n_positions=64)
    end = refused(model, "-a", "gptq", "--seq-len", "128", "--data", text)
    assert end.code == USAGE and "longer than the 64 positions" in end.error and end.hint == "use --seq-len 64"
    args = ["-m", str(model), "-o", str(tmp_path / "Q"), "-a", "gptq", "--num-samples", "2", "--data", str(text)]
    assert app.run(["quantize", *args]) == 0
    assert "2 rows of 64 tokens" in capsys.readouterr().err


def test_experts_of_a_model_that_has_none(refused, model, text):
    end = refused(model, *CALIBRATED, "--data", text, "--moe-calibration", "all")
    assert end.code == USAGE and "has no experts" in end.error


def sharded(model: Path) -> dict[str, str]:
    """Splits the weights over two shards; returns the index' map."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    weights(model).unlink()
    loaded.save_pretrained(model, max_shard_size="200KB")
    names: dict[str, str] = json.loads((model / INDEX).read_text())["weight_map"]
    assert len(set(names.values())) > 1
    return names


def test_shard_that_is_named_but_missing(refused, model):
    shard = max(sharded(model).values())
    (model / shard).unlink()
    end = refused(model)
    assert end.code == INPUT and end.hint
    assert end.error == f"shard {shard} is named in {INDEX} but missing from {model}"


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "model.bin", "", "."])
def test_shard_names_with_paths(refused, model, shard):
    names = sharded(model)
    tiny.edit_json(model / INDEX, weight_map=names | {Q: shard})
    end = refused(model)
    assert end.code == INPUT
    assert f"names the shard {shard!r}" in end.error


def test_shard_name_that_is_no_text(refused, model):
    names = sharded(model)
    tiny.edit_json(model / INDEX, weight_map=names | {Q: 7})
    end = refused(model)
    assert end.code == INPUT
    assert end.error == f"{model / INDEX} is not a safetensors index: weight_map[...]: expected str, got int"


def test_index_that_places_a_tensor_in_the_wrong_shard(refused, model):
    names = sharded(model)
    other = next(f for f in names.values() if f != names[Q])
    tiny.edit_json(model / INDEX, weight_map=names | {Q: other})
    end = refused(model)
    assert end.code == INPUT and f"the index places tensor {Q} here, it is not in the file" in end.error


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_index_that_is_none(refused, model, content):
    sharded(model)
    (model / INDEX).write_text(content)
    assert refused(model).code == INPUT


def test_pickle_weights_are_refused_and_not_opened(refused, model):
    weights(model).unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    end = refused(model)
    assert end.code == INPUT
    assert "holds pickle weights (pytorch_model.bin), which can run code" in end.error
    assert "save_pretrained" in end.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q, "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_numbers(refused, model, name, value):
    tiny.edit_weights(model, lambda t: t[name].view(-1)[-1].fill_(value))
    end = refused(model)
    assert end.code == INPUT and end.hint
    assert end.error == f"tensor {name} holds NaN or infinite values"


@pytest.mark.parametrize("name", [Q, "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_numbers_in_a_calibrated_run(refused, model, text, name):
    tiny.edit_weights(model, lambda t: t[name].view(-1)[0].fill_(float("nan")))
    end = refused(model, *CALIBRATED, "--data", text)
    assert end.code == INPUT
    assert end.error == f"tensor {name} holds NaN or infinite values"


def test_activations_that_overflow_name_the_layer(refused, model, text):
    tiny.edit_weights(model, lambda t: t["model.layers.1.post_attention_layernorm.weight"].fill_(3e38))
    end = refused(model, *CALIBRATED, "--data", text)
    assert end.code == INPUT and end.hint
    assert end.error == "activations are NaN or infinite at the input of model.layers.1.mlp.gate_proj"


# -- options that cannot be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 8, 15, -2, -64])
def test_group_size_that_cannot_be(refused, model, size):
    end = refused(model, f"--group-size={size}")
    assert end.code == USAGE
    assert f"group size must be 16 or more, or -1 for per channel, got {size}" in end.error
    end = refused(model, "--override", f"q_proj=group_size={size}")
    assert end.code == USAGE and "group size" in end.error


@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 16])
def test_bits_that_cannot_be(refused, model, bits):
    assert refused(model, f"--bits={bits}").code == USAGE
    assert refused(model, "--override", f"q_proj=bits={bits}").code == USAGE


@pytest.mark.parametrize("bits", [1, 7])
def test_bits_that_the_algorithm_does_not_make(refused, model, bits):
    end = refused(model, "-a", "gptq", "--bits", bits)
    assert end.code == USAGE
    assert end.error == f"gptq makes 2, 3, 4, 5, 6, 8 bits, not {bits}" and "algorithms" in end.hint
    end = refused(model, "-a", "gptq", "--override", f"o_proj=bits={bits}")
    assert end.code == USAGE and f"not {bits}" in end.error and "o_proj" in end.error


@pytest.mark.parametrize("text", ["q_proj", "q_proj=4", "q_proj=bits=four", "q_proj=bitz=4", "(=bits=4", "x=sym=maybe"])
def test_overrides_that_cannot_be_read(refused, model, text):
    end = refused(model, "--override", text)
    assert end.code == USAGE and "override" in end.error


@pytest.mark.parametrize("flag", [("--exclude", "no_such"), ("--override", "no_such=bits=8")])
def test_patterns_that_match_nothing(refused, model, flag):
    end = refused(model, *flag)
    assert end.code == USAGE and end.hint
    assert end.error == "no linear is named like 'no_such'"


def test_exclude_that_leaves_nothing(refused, model):
    assert refused(model, "--exclude", ".").error == "--exclude leaves nothing to quantize"
    end = refused(model, "--exclude", "[")
    assert end.code == USAGE and "--exclude '[' is not a regular expression" in end.error


@pytest.mark.parametrize(
    ("args", "nearest"),
    [
        (("--bitz", "4"), "--bits"),
        (("-a", "gtpq"), "'gptq'"),
        (("--preset", "balancd"), "balanced"),
        (("-a", "gptq", "--set", "damp_procent=0.1"), "'damp_percent'"),
        (("--dtype", "bfloat61"), "bfloat16"),
        (("--override", "q_proj=bis=8"), "'bits'"),
    ],
)
def test_names_that_are_unknown_name_the_nearest(refused, model, args, nearest):
    end = refused(model, *args)
    assert end.code == USAGE and nearest in end.error


def test_options_that_would_have_no_effect(refused, model, text):
    for args in (("-a", "rtn", "--data", text), ("--preset", "fast", "--num-samples", 8), ("-a", "rtn", "--seed", 3)):
        end = refused(model, *args)
        assert end.code == USAGE and "no effect" in end.error


# -- calibration text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n ", "holds no text"),
        ("empty.jsonl", b"", "empty"),
        ("binary.txt", bytes(range(256)) * 20, "text"),
        ("binary.jsonl", b"\x00\xff\xfe" * 50, "text"),
        ("field.jsonl", b'{"body": "w1 w2"}\n', "text"),
        ("broken.jsonl", b'{"text": "w1"}\n{"text": \n', "2"),
        ("list.jsonl", b"[1, 2]\n", "1"),
        ("field.csv", b"body,title\nw1,w2\n", "text"),
        ("not.parquet", b"PAR1 it is not", "parquet"),
        ("short.txt", b"w1 w2 w3", "16"),
    ],
)
def test_calibration_files_that_do_not_serve(refused, model, tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    end = refused(model, *CALIBRATED, "--data", tmp_path / name)
    assert end.code == INPUT
    assert why in end.error and name in end.error


def test_calibration_file_that_is_missing(refused, model, tmp_path):
    end = refused(model, *CALIBRATED, "--data", tmp_path / "none.txt")
    assert end.code == INPUT and "none.txt" in end.error
    end = refused(model, *CALIBRATED, "--data", tmp_path)
    assert end.code == INPUT and str(tmp_path) in end.error


def test_calibration_needs_a_tokenizer(refused, model, text):
    for path in model.glob("tokenizer*"):
        path.unlink()
    end = refused(model, *CALIBRATED, "--data", text)
    assert end.code == INPUT and "tokenizer" in end.error


# -- where to write ---------------------------------------------------------------------------------------------------


def test_output_that_exists(refused, model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    end = refused(model, output=tmp_path / "mine")
    assert end.code == USAGE and "--force" in end.hint
    assert end.error == f"output folder {tmp_path / 'mine'} exists and is not empty"
    end = refused(model, "--force", output=tmp_path / "mine")
    assert end.code == USAGE and "was not made by quantcli, --force does not replace it" in end.error
    end = refused(model, output=tmp_path / "mine" / "thesis.tex")
    assert end.code == USAGE and "is a file" in end.error
    end = refused(model, output=tmp_path / "mine" / "thesis.tex" / "deeper")
    assert end.code in (USAGE, RESOURCE)


def test_output_of_ours_is_replaced_with_force(refused, model, tmp_path):
    target = tmp_path / "Q"
    line = ["quantize", "-m", str(model), "-o", str(target), "-q"]
    assert app.run([*line, "-a", "rtn"]) == 0
    end = refused(model, output=target)
    assert end.code == USAGE and "--force" in end.hint
    assert app.run([*line, "-a", "rtn", "--bits", "8", "--force"]) == 0
    assert json.loads((target / "model" / "config.json").read_text())["quantization_config"]["bits"] == 8
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["Q", "model"]


def test_output_of_ours_stays_when_the_replacement_fails(refused, model, tmp_path):
    assert app.run(["quantize", "-m", str(model), "-o", str(tmp_path / "Q"), "-q", "-a", "rtn"]) == 0
    tiny.edit_weights(model, lambda t: t[Q].fill_(float("nan")))
    assert refused(model, "--force", output=tmp_path / "Q").code == INPUT  # digests before and after are the same


def test_output_inside_the_input_and_around_it(refused, model, tmp_path):
    end = refused(model, output=model / "out")
    assert end.code == USAGE and "lies inside the input" in end.error and end.hint
    end = refused(model, "--force", output=model)
    assert end.code == USAGE and "lies inside the input" in end.error
    end = refused(model, "--force", output=tmp_path)
    assert end.code == USAGE and "contains the input" in end.error
    (tmp_path / "link").symlink_to(model)
    end = refused(model, output=tmp_path / "link" / "out")
    assert end.code == USAGE and "lies inside the input" in end.error


# -- machine too small ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [("-a", "rtn"), (*CALIBRATED, "--data", "text.txt")], ids=["rtn", "gptq"])
def test_not_enough_memory(refused, model, text, args):
    end = refused(model, *args, "--max-memory", "1MB")
    assert end.code == RESOURCE and end.hint
    assert "of memory" in end.error


def test_not_enough_disk_is_seen_before_anything_is_written(refused, model, monkeypatch):
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    end = refused(model)
    assert end.code == RESOURCE and end.hint
    assert "0 MB free" in end.error


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 800 kB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(os.name != "posix" or not shutil.which("mount"), reason="needs mount")
def test_disk_that_fills_up_ends_the_run_and_more_room_continues_it(model, text, small_disk, tmp_path, capsys):
    line = ["quantize", "-m", str(model), "-q", "-a", "gptq", "--data", str(text)]
    line += ["--num-samples", "20", "--seq-len", "16", "--group-size", "32"]
    assert app.run([*line, "-o", str(tmp_path / "whole")]) == 0
    filler = small_disk / "filler"
    filler.write_bytes(bytes(600_000))
    capsys.readouterr()
    target = small_disk / "Q"
    assert app.run([*line, "-o", str(target)]) == RESOURCE
    err = capsys.readouterr().err.splitlines()
    assert err[0] == f"error: cannot write {target}: no space left on the disk"
    assert err[1].startswith("hint: ")
    assert not target.exists()
    filler.unlink()
    assert app.run([*line, "-o", str(target)]) == 0
    assert tiny.digests(target / "model", "*.safetensors") == tiny.digests(tmp_path / "whole/model", "*.safetensors")
    assert [p.name for p in small_disk.iterdir()] == ["Q"]
