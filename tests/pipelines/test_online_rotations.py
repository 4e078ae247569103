"""`quarot` with online=true: the same function in our loader, a loud no elsewhere, and far better few-bit inputs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
import quantcli
from quantcli.cli import app
from quantcli.errors import InputError, UsageError
from quantcli.formats.layouts import LAYOUTS
from quantcli.models.checkpoint import Checkpoint, read_config
from quantcli.models.online import OnlineRotations
from quantcli.options import (
    FORMATS,
    CalibrationOptions,
    CaptureOptions,
    EvaluateOptions,
    QuantizeOptions,
    SimulationOptions,
)
from quantcli.pipelines import capture, evaluate, quantize
from quantcli.pipelines.inspect import run as inspect_run
from quantcli.pipelines.planning.decide import make_plan

ONLINE = {"online": "true"}
W4A4KV4 = SimulationOptions(a_bits=4, k_bits=4, v_bits=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return families.save(noisy(families.build("llama")), tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def rotated(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("rotated") / "q"
    quantize.run(QuantizeOptions(str(source), output, "quarot", settings=ONLINE))
    return output


def noisy(model):
    """Gains and biases that matter."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def options(model, output, text, **values):
    calibration = CalibrationOptions(str(text), num_samples=8, seq_len=32, batch_size=2)
    return QuantizeOptions(str(model), output, calibration=calibration, **({"group_size": 32} | values))


def logits(folder, dtype=torch.float32):
    model = quantcli.load(folder, dtype=dtype)
    if dtype == torch.float64:
        families.exact(model)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("mode", ["hadamard", "random"])
@pytest.mark.parametrize("family", families.ROTATABLE)
def test_the_function_stays(family, mode, tmp_path):
    settings = {**ONLINE, "rotate_mode": mode}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        source = families.save(noisy(families.build(family)).to(dtype), tmp_path / f"source-{dtype}")
        output, offline = tmp_path / f"rotated-{dtype}", tmp_path / "offline"
        quantize.run(QuantizeOptions(str(source), output, "quarot", settings=settings))
        if dtype == torch.float32:
            quantize.run(QuantizeOptions(str(source), offline, "quarot", settings={"rotate_mode": mode}))
            found, other = Checkpoint.open(output / "model"), Checkpoint.open(offline / "model")
            changed = {n for n in found.entries if not torch.equal(found.read(n), other.read(n))}
            assert changed == {n for n in found.entries if n.endswith(("down_proj.weight", ".w2.weight"))}
        wanted = logits(source, dtype)
        assert (logits(output, dtype) - wanted).abs().max() < tolerance * wanted.abs().max()


def test_others_refuse_the_folder_and_we_know_what_it_is(source, rotated):
    written = json.loads((rotated / "model/config.json").read_text())
    assert written["model_type"] == "llama_online_rotated"
    assert written["architectures"] == ["LlamaForCausalLMOnlineRotated"]
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        AutoModelForCausalLM.from_pretrained(rotated / "model")
    config = read_config(rotated / "model")
    before = read_config(source)
    assert (config["model_type"], config["architectures"]) == (before["model_type"], before["architectures"])
    assert OnlineRotations.of(config) == OnlineRotations("hadamard", 0)
    assert OnlineRotations.of(before) is None
    assert inspect_run(rotated).model_type == "llama_online_rotated"
    assert "generate" in dir(quantcli.load(rotated))


@pytest.mark.parametrize(("chain", "tolerance"), [("quarot,gptq", 1e-5), ("quarot,awq,gptq", 2e-3)])
def test_what_is_written_is_what_ran(chain, tolerance, source, text, tmp_path, ran):
    """The stream of the run saw turned inputs: its last hidden states are those of the loaded folder."""
    quantize.run(options(source, tmp_path / "q", text, algorithm=chain, bits=4, settings=ONLINE))
    model, seen = quantcli.load(tmp_path / "q"), []
    model.model.layers[-1].register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        model(ran.tokens, use_cache=False)
    # awq divides scales that are already float16
    assert (seen[0] - ran.hidden).abs().max() < tolerance * seen[0].abs().max()


@pytest.mark.parametrize("correct", [False, True])
def test_quantizing_the_rotated_folder_is_the_same_as_both_at_once(correct, source, rotated, text, tmp_path):
    run = {"correct_earlier": correct, "bits": 3}
    quantize.run(options(source, tmp_path / "once", text, algorithm="quarot,gptq", settings=ONLINE, **run))
    quantize.run(options(rotated, tmp_path / "twice", text, algorithm="gptq", **run))
    once, twice = (Checkpoint.open(tmp_path / n / "model") for n in ("once", "twice"))
    assert once.entries.keys() == twice.entries.keys()
    assert all(torch.equal(once.read(n), twice.read(n)) for n in once.entries)
    assert OnlineRotations.of(once.config) == OnlineRotations.of(twice.config) == OnlineRotations("hadamard", 0)


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in (*LAYOUTS, "bnb-int8", "gguf")])
def test_every_format_keeps_the_mark(format, source, tmp_path):
    rounder = "nf4" if format == "bnb" else "rtn"
    plan = {"group_size": 32, "format": format, "settings": ONLINE}
    quantize.run(QuantizeOptions(str(source), tmp_path / "q", f"quarot,{rounder}", **plan))
    wanted, found = logits(source), logits(tmp_path / "q")
    assert (found - wanted).square().mean() < 0.3 * wanted.square().mean()
    run = EvaluateOptions(str(tmp_path / "q"), num_samples=1, seq_len=16, speed=False, simulation=W4A4KV4)
    assert evaluate.run(run).simulated["online_rotations"] == {"mode": "hadamard", "seed": 0}


def loud(folder):
    """A model with loud channels where QuaRot looks for them: residual stream, gated product, keys."""
    model = families.build("llama")
    with torch.no_grad():
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[[3, 40]] *= 30
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                linear.weight[:, [3, 40]] /= 30
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                linear.weight[:, [3, 40]] /= 30
            block.mlp.up_proj.weight[[5, 70]] *= 30
            block.mlp.down_proj.weight[:, [5, 70]] /= 30
            block.self_attn.q_proj.weight[[1, 17, 33, 49]] /= 10  # in every head alike
            block.self_attn.k_proj.weight[[1, 17]] *= 10
    return families.save(model, folder)


def test_outliers_cost_little_once_they_are_spread(tmp_path, text):
    source = loud(tmp_path / "loud")
    kl = {}
    for name, settings in (("offline", {}), ("online", ONLINE)):
        quantize.run(QuantizeOptions(str(source), tmp_path / name, "quarot", settings=settings))
    for name in ("loud", "offline", "online"):
        run = EvaluateOptions(
            str(tmp_path / name), str(source), str(text), num_samples=2, seq_len=64, speed=False, simulation=W4A4KV4
        )
        result = evaluate.run(run)
        kl[name] = result.kl_mean
        assert (result.simulated["online_rotations"] is not None) == (name == "online")
    assert kl["online"] < 0.4 * kl["offline"] < 0.4 * kl["loud"]
    print(kl)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_capture_refuses_it(rotated, tmp_path):
    with pytest.raises(InputError, match="weights expect rotations at run time") as caught:
        capture.run(CaptureOptions(str(rotated), tmp_path / "onnx"))
    assert "without --set online=true" in caught.value.hint
    assert not (tmp_path / "onnx").exists()


def test_it_is_not_rotated_twice(rotated, tmp_path):
    with pytest.raises(InputError, match="cannot be taken in twice"):
        make_plan(QuantizeOptions(str(rotated), tmp_path / "q", "quarot"))


@pytest.mark.parametrize(
    "entry", [{"version": 2, "mode": "hadamard", "seed": 0}, {"version": 1, "mode": "dct", "seed": 0}, {"version": 1}]
)
def test_a_mark_that_is_not_known(entry):
    with pytest.raises(InputError, match="version 1 with mode and seed is read"):
        OnlineRotations.of({"quantcli": {"online_rotations": entry}})


@pytest.mark.parametrize("ours", [None, "text", {"online_rotations": "yes"}, {}])
def test_keys_of_others_are_no_mark(ours, source, tmp_path):
    assert OnlineRotations.of({"quantcli": ours}) is None


# -- the commands -----------------------------------------------------------------------------------------------------


def test_evaluate_from_the_command_line(source, rotated, text, capsys):
    words = ["evaluate", "-m", str(rotated), "--reference", str(source), "--data", str(text), "--num-samples", "2"]
    words += ["--seq-len", "64", "--json"]
    assert app.run([*words, "--no-speed"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["simulated"] is None and plain["kl_mean"] < 1e-6
    assert app.run([*words, "--a-bits", "4", "--k_bits", "4", "--v-bits", "4", "--a-clip-ratio", "1"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["kl_mean"] > 1e-3
    assert found["decode_tokens_per_second"] is None and "speed is not measured" in err
    assert found["simulated"]["a_bits"] == 4 and found["simulated"]["online_rotations"] == {
        "mode": "hadamard",
        "seed": 0,
    }
    assert found["simulated"]["a_clip_ratio"] == 1 and found["simulated"]["k_clip_ratio"] == 0.95
    said = "activations 4 bits sym per token, clip 1; keys 4 bits asym per token and head, clip 0.95; values 4 bits"
    assert said in " ".join(err.split())
    assert app.run([*words[:-1], "--v-bits", "4"]) == 0
    assert "R3 and R4 at run time" in " ".join(capsys.readouterr().out.split())


def test_quantize_evaluates_what_was_asked(source, text, tmp_path, capsys):
    words = ["quantize", "-m", str(source), "-o", str(tmp_path / "q"), "-a", "quarot", "--w_bits", "4"]
    words += ["--w_rtn", "True"]
    words += ["--rotate", "True", "--a_bits", "4", "--k_bits", "4", "--v_bits", "4", "--set", "online=true", "--json"]
    assert app.run(words) == 2
    assert "add --evaluate" in capsys.readouterr().err
    assert app.run([*words[:-1], "--evaluate", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rotations are computed at run time" in said and "activations 4 bits sym" in said


def test_a_graph_is_refused(tmp_path, source, text):
    from quantcli.evaluate.language_model import open_language_model

    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(UsageError, match="simulated in checkpoints only"):
        open_language_model(tmp_path, "cpu", False, SimulationOptions(a_bits=8))
