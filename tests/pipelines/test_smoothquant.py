"""`quantize -a smoothquant` on checkpoints: the float function stays, and integers of both sides lose far less."""

import json

import pytest
import torch

import families
import quantcli
import tiny
from quantcli.cli import app
from quantcli.errors import InputError, UsageError
from quantcli.evaluate.language_model import open_language_model
from quantcli.folder import read_manifest
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.load import load
from quantcli.options import CalibrationOptions, EvaluateOptions, QuantizeOptions, SimulationOptions
from quantcli.pipelines import evaluate, quantize
from quantcli.pipelines.planning.decide import make_plan

LOUD = (3, 40)
W8 = {"bits": 8, "group_size": -1, "symmetric": True}


def options(model, output, text, algorithm="smoothquant", **values):
    calibration = CalibrationOptions(str(text), num_samples=8, seq_len=32, batch_size=2)
    return QuantizeOptions(str(model), output, algorithm, calibration=calibration, **values)


def logits(folder, tokens=range(3, 60)):
    with torch.no_grad():
        return load(folder)(torch.tensor([*tokens])[None]).logits


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """Norms and gated products with a few channels a hundred times as large as the rest, under ordinary weights."""
    model = families.build("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[[*LOUD]] *= 100
            elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight")):
                parameter[:, [*LOUD]] /= 60
            elif name.endswith("up_proj.weight"):
                parameter[:, [*LOUD]] /= 60
                parameter[[*LOUD]] *= 60
            elif name.endswith("down_proj.weight"):
                parameter[:, [*LOUD]] /= 40
    return families.save(model, tmp_path_factory.mktemp("loud") / "model")


@pytest.fixture(scope="module")
def smooth(loud, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smooth") / "s"
    quantize.run(options(loud, folder, text))
    return folder


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_float_function_stays(family, models, text, tmp_path):
    source = models(family)
    result = quantize.run(options(source, tmp_path / "s", text, settings={"alpha": "0.5"}))
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "s/model")
    assert before.entries.keys() == after.entries.keys() and before.config == after.config
    changed = {n for n in before.entries if not torch.equal(before.read(n), after.read(n))}
    wanted, found = logits(source), logits(tmp_path / "s")
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    for scale in result.scales:
        assert scale.alpha == 0.5 and scale.relative_error is None
    scaled = {name for scale in result.scales for name in scale.linears}
    plan = make_plan(options(source, tmp_path / "t", text))
    # what is smoothed has other weights, and nothing else has but what makes it
    assert {plan.scaled[name].disk for name in scaled} <= changed
    assert len(changed) <= len(scaled) + 2 * len({scale.producer for scale in result.scales})
    assert result.layers == [] and result.size_bytes == pytest.approx(result.parent_size_bytes, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_was_but_for_rounding(dtype, loud, text, tmp_path):
    model = families.build("qwen2").to(dtype)
    source = families.save(model, tmp_path / "m")
    quantize.run(options(source, tmp_path / "s", text))
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "s/model")
    assert all(after.entries[n].dtype == dtype for n in before.entries)
    wanted, found = (quantcli.load(f).float()(torch.arange(3, 60)[None]).logits for f in (source, tmp_path / "s"))
    unit = torch.finfo(dtype).eps
    assert (found - wanted).square().mean().sqrt() < 3 * unit * wanted.square().mean().sqrt()


def test_outliers_are_evened_out(loud, smooth, text):
    """Of every input that can be smoothed, the largest channel is nearer to the middle one."""

    def spread(folder):
        ratios = {}
        model = load(folder)

        def hook(name):
            def note(_module, args):
                sizes = args[0].abs().amax((0, 1))
                ratios[name] = float(sizes.max() / sizes.median())

            return note

        for name, module in model.named_modules():
            if name.endswith(("q_proj", "gate_proj", "down_proj")):
                module.register_forward_pre_hook(hook(name))
        with torch.no_grad():
            model(torch.arange(3, 60)[None])
        return ratios

    before, after = spread(loud), spread(smooth)
    assert len(before) == 6 and min(before.values()) > 20
    assert all(after[name] < 0.4 * before[name] for name in before)
    report = json.loads((smooth / "report.json").read_text())
    assert len(report["scales"]) == 8 and len(report["scales"][0]["linears"]) == 3
    assert all(s["relative_error"] < 0.5 for s in report["scales"] if "o_proj" not in s["linears"][0])


def divergence(model, reference, text, a_bits, symmetric=True):
    asked = EvaluateOptions(
        str(model), str(reference), str(text), num_samples=4, seq_len=64, speed=False,
        simulation=SimulationOptions(a_bits=a_bits, a_symmetric=symmetric),
    )  # fmt: skip
    return evaluate.run(asked).kl_mean


def test_integers_of_both_sides_lose_far_less(loud, text, tmp_path):
    """W8A8, activations per token: simulated as `evaluate --a-bits 8` does."""
    found = {}
    for algorithm in ("gptq", "smoothquant,rtn", "smoothquant,gptq"):
        asked = options(loud, tmp_path / algorithm, text, algorithm, **W8)
        result = quantize.run(asked)
        found[algorithm] = divergence(tmp_path / algorithm, loud, text, 8)
        if "," in algorithm:
            assert {layer.algorithm for layer in result.layers} == {algorithm.split(",")[1]}
            assert sum(layer.scaled for layer in result.layers) >= 12 and len(result.scales) == 8
            assert found[algorithm] < 0.1 * found["gptq"]


def test_few_bits_for_weights_move_less_into_them(loud, text, tmp_path):
    grids = {"w8": {"bits": 8, "group_size": -1}, "w3": {"bits": 3, "group_size": -1}}
    alphas = {}
    for name, grid in grids.items():
        result = quantize.run(options(loud, tmp_path / name, text, "smoothquant,rtn", **grid))
        alphas[name] = sum(s.alpha or 0 for s in result.scales)
    assert alphas["w3"] < 0.9 * alphas["w8"]


def test_the_float_folder_is_what_rounding_in_one_go_rounds(loud, smooth, text, tmp_path):
    """smoothquant, then rtn on its result, is smoothquant,rtn: the same grid for the search, the same weights."""
    quantize.run(options(loud, tmp_path / "one", text, "smoothquant,rtn", format="float", **W8))
    quantize.run(QuantizeOptions(str(smooth), tmp_path / "two", "rtn", format="float", **W8))
    one, two = logits(tmp_path / "one"), logits(tmp_path / "two")
    assert (one - two).square().mean().sqrt() < 0.02 * one.square().mean().sqrt()


def test_every_layer_may_have_an_alpha_of_its_own(loud, text, tmp_path):
    warnings = tiny.Warnings()
    settings = {"alpha": "down_proj=0.8,o_proj=auto,0.5"}
    result = quantize.run(options(loud, tmp_path / "s", text, settings=settings), warnings)
    for scale in result.scales:
        wanted = 0.8 if "down_proj" in scale.linears[0] else 0.5
        if "o_proj" in scale.linears[0]:
            assert scale.relative_error is not None
        else:
            assert scale.alpha == wanted
    assert warnings.said == []
    wanted, found = logits(loud), logits(tmp_path / "s")
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_an_alpha_for_what_cannot_be_scaled_is_told(models, text, tmp_path):
    warnings = tiny.Warnings()
    asked = options(models("gpt2"), tmp_path / "s", text, settings={"alpha": r"mlp\.c_proj=0.8,0.5"})
    quantize.run(asked, warnings)
    assert warnings.said == [r"no input of 'mlp\\.c_proj' can be scaled, its alpha had no effect"]


def test_rotations_come_first(models, text, tmp_path):
    source = models("llama-tied")
    result = quantize.run(options(source, tmp_path / "s", text, "quarot,smoothquant"))
    assert len(result.scales) == 8 and list(result.plan["transforms"]) == ["quarot", "smoothquant"]
    wanted, found = logits(source), logits(tmp_path / "s")
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("algorithm", ["smoothquant", "smoothquant,gptq"])
def test_stopped_and_continued(algorithm, loud, text, tmp_path, stopped):
    whole = quantize.run(options(loud, tmp_path / "whole", text, algorithm))
    with stopped():
        quantize.run(options(loud, tmp_path / "q", text, algorithm))
    with pytest.raises(UsageError, match="settings"):
        quantize.run(options(loud, tmp_path / "q", text, algorithm, settings={"alpha": "0.5"}))
    again = quantize.run(options(loud, tmp_path / "q", text, algorithm))
    assert again.scales == whole.scales
    a, b = (Checkpoint.open(tmp_path / n / "model") for n in ("whole", "q"))
    assert a.entries.keys() == b.entries.keys()
    assert all(torch.equal(a.read(n), b.read(n)) for n in a.entries)


def test_forwards_that_are_run_again_find_the_same(loud, text, tmp_path, monkeypatch):
    """Where memory does not allow paused forwards to be kept."""
    from dataclasses import replace

    from quantcli.pipelines import quantize_checkpoint as pipeline

    quantize.run(options(loud, tmp_path / "kept", text))
    monkeypatch.setattr(pipeline, "make_plan", lambda asked: replace(make_plan(asked), keep_paused=False))
    quantize.run(options(loud, tmp_path / "again", text))
    assert tiny.digests(tmp_path / "kept/model") == tiny.digests(tmp_path / "again/model")


def test_the_command(loud, text, tmp_path, capsys):
    words = ["quantize", "-m", str(loud), "-o", str(tmp_path / "s"), "-a", "smoothquant", "--data", str(text)]
    words += ["--num-samples", "4", "--seq-len", "32"]
    assert app.run([*words, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "smoothquant (alpha=auto, n_grid=20, rows=256, a_bits=8, w_bits=0" in plan and "a float model" in plan
    assert app.run(words) == 0
    assert " of 8 inputs smoothed, alpha 0." in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "s")
    assert manifest.kind == "checkpoint" and manifest.options["algorithm"] == "smoothquant"
    assert app.run([*words, "--json", "--force"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == [] and len(found["scales"]) == 8
    assert found["scales"][3]["linears"] == ["model.layers.0.mlp.down_proj"]
    assert found["scales"][3]["producer"] == "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 8}, "smoothquant alone writes a float model, bits would have no effect"),
        ({"format": "gptq"}, "smoothquant alone writes a float model"),
        ({"exclude": ("o_proj",)}, "exclude would have no effect"),
        ({"correct_earlier": True}, "--correct-earlier is a step of gptq"),
        ({"preset": "best"}, "preset best is a setting of gptq, not of float"),
        ({"algorithm": "smoothquant,awq,rtn"}, "cannot be combined"),
        ({"algorithm": "rtn,smoothquant"}, "rtn rounds, nothing can follow it"),
        ({"algorithm": "smoothquant,static"}, "static quantizes ONNX graphs, not checkpoints"),
        ({"settings": {"fold_only": "true"}}, "fold_only is for ONNX graphs, it would have no effect"),
        ({"settings": {"nodes_include": "a"}}, "nodes_include is for ONNX graphs"),
        ({"settings": {"alpha": "1.5"}}, "alpha is auto or from 0 to 1, got '1.5'"),
        ({"settings": {"alpha": "0.5,0.8"}}, "two values for all"),
        ({"settings": {"alpha": "(=0.5"}}, "is not a regular expression"),
        ({"settings": {"alpha": "0.5", "a_bits": "4"}}, "are of alpha=auto"),
        ({"settings": {"a_bits": "9"}}, "a_bits must be 2 to 8, got 9"),
        ({"settings": {"alpha": "dwon_proj=0.5"}}, "no linear is named like 'dwon_proj'"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_refusals(values, message, models, text, tmp_path):
    with pytest.raises(UsageError, match=message):
        make_plan(options(models("llama"), tmp_path / "s", text, **values))


def test_the_way_to_integers_is_told(models, text, tmp_path):
    with pytest.raises(UsageError) as caught:
        make_plan(options(models("llama"), tmp_path / "s", text, "smoothquant,dynamic"))
    for step in ("-a smoothquant -o S", "capture-onnx-graph -m S -o GRAPH", "-m GRAPH -a dynamic"):
        assert step in caught.value.hint


def test_a_model_in_which_nothing_can_be_scaled(models, text, tmp_path, monkeypatch):
    from quantcli.pipelines.blockwise import blocks

    monkeypatch.setattr(blocks, "find_folds", lambda *_: {})
    with pytest.raises(InputError, match="smoothquant can scale no input"):
        quantize.run(options(models("llama"), tmp_path / "s", text))
    assert list(tmp_path.iterdir()) == []


def test_the_chain_to_integers(loud, smooth, text, tmp_path, capsys):
    """smoothquant, then capture, then dynamic: the graph is the checkpoint, and its integers are nearer to it."""
    outputs = {}
    for name, folder in {"plain": loud, "smooth": smooth}.items():
        graph, integers = tmp_path / f"{name}-graph", tmp_path / f"{name}-int8"
        assert app.run(["capture-onnx-graph", "-m", str(folder), "-o", str(graph)]) == 0
        words = ["quantize", "-m", str(graph), "-o", str(integers), "-a", "dynamic", "--per-channel"]
        assert app.run([*words, "--nodes-exclude", "lm_head"]) == 0
        tokens = torch.arange(3, 60)
        for what, place in {"checkpoint": folder, "graph": graph / "model", "integers": integers / "model"}.items():
            opened = open_language_model(place, None, False)
            outputs[name, what] = opened.logits(tokens)
            opened.close()
    capsys.readouterr()
    wanted = outputs["plain", "checkpoint"]
    scale = wanted.abs().max()
    for name in ("plain", "smooth"):
        assert (outputs[name, "graph"] - outputs[name, "checkpoint"]).abs().max() < 1e-4 * scale
        assert (outputs[name, "checkpoint"] - wanted).abs().max() < 1e-4 * scale
    plain, smoothed = ((outputs[n, "integers"] - wanted).square().mean() for n in ("plain", "smooth"))
    assert smoothed < 0.1 * plain
