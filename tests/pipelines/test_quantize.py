"""`quantize` on a tiny model of every family: what it writes is what it computed, and loads as such."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import families
import quantcli
from quantcli.errors import InputError, ResourceError, UsageError
from quantcli.folder import read_manifest
from quantcli.formats import gptq
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.linear import PackedLinear
from quantcli.options import CalibrationOptions, Override, QuantizeOptions
from quantcli.pipelines import quantize, quantize_checkpoint
from quantcli.pipelines.blockwise import solve as solve_module
from quantcli.pipelines.blockwise import stages
from quantcli.pipelines.blockwise.journal import Journal
from quantcli.pipelines.planning.decide import make_plan


def options(model, output, text=None, **values):
    calibration = CalibrationOptions()
    if text is not None:
        calibration = CalibrationOptions(str(text), num_samples=8, seq_len=32, batch_size=3)
    values.setdefault("algorithm", "gptq" if text else "rtn")
    values.setdefault("group_size", 32)
    values.setdefault("dtype", "keep")
    values.setdefault("readers", ("quantcli",))
    if values["algorithm"] == "gptq":
        values.setdefault("format", "gptq")
    return QuantizeOptions(str(model), Path(output), calibration=calibration, **values)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family, algorithm, models, text, tmp_path):
    """The written folder's logits are those of the float model with its weights replaced by the computed ones."""
    source = models(family)
    result = quantize.run(options(source, tmp_path / "q", text if algorithm == "gptq" else None, algorithm=algorithm))
    names = [layer.name for layer in result.layers]
    assert len(names) == len(set(names)) > 0
    loaded = quantcli.load(tmp_path / "q")
    expected = quantcli.load(source)
    packed = {n: m for n, m in loaded.named_modules() if isinstance(m, PackedLinear)}
    assert set(packed) == set(names)
    for name, module in packed.items():
        set_weight(expected, name, module.quantized().dequantize())
    assert torch.allclose(logits(loaded), logits(expected), atol=1e-4, rtol=1e-4)
    errors = [layer.relative_error for layer in result.layers]
    assert 0 < max(errors) < 0.2
    if algorithm == "gptq":
        reached = [layer for layer in result.layers if layer.tokens >= 100]
        assert sum(x.relative_error for x in reached) < 0.8 * sum(x.rtn_relative_error for x in reached)


def set_weight(model, name, weight):
    """Puts [N, K] where transformers keeps it: a Linear, GPT-2's transposed Conv1D, or one expert of a fused stack."""
    experts, _, place = name.partition(".experts.")
    if not place:
        module = model.get_submodule(name)
        module.weight.data.copy_(weight.T if type(module).__name__ == "Conv1D" else weight)
        return
    number, projection = place.split(".")
    fused = model.get_submodule(experts + ".experts")
    if projection in ("w2", "down_proj"):
        fused.down_proj.data[int(number)] = weight
    else:
        half = 0 if projection in ("w1", "gate_proj") else len(weight)
        fused.gate_up_proj.data[int(number), half : half + len(weight)] = weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 48, -1])
def test_exported_is_computed(bits, symmetric, group_size, models, text, tmp_path, monkeypatch):
    """The codes on disk, read without our writer's help, are those that the rounder returned."""
    computed = {}
    original = solve_module.solve_linears

    def spy(*args):
        results, reports = original(*args)
        computed.update(results)
        return results, reports

    monkeypatch.setattr(stages, "solve_linears", spy)
    source = models("llama")
    quantize.run(options(source, tmp_path / "q", text, bits=bits, symmetric=symmetric, group_size=group_size))
    checkpoint = Checkpoint.open(tmp_path / "q/model")
    config = checkpoint.config["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, group_size, symmetric)
    assert len(computed) == 14
    for name, tensor in computed.items():
        parts = {part: checkpoint.read(f"{name}.{part}") for part in gptq.PARTS}
        read = gptq.unpack(parts, gptq.scheme_of(config, name))
        for field in ("codes", "scale", "zero", "group"):
            assert torch.equal(getattr(read, field), getattr(tensor, field)), (name, field)


@pytest.mark.parametrize(
    "settings", [{"preset": "best"}, {"correct_earlier": True}, {"settings": {"order": "desc_act"}}]
)
def test_other_ways_of_gptq(settings, models, text, tmp_path):
    plain = quantize.run(options(models("llama"), tmp_path / "plain", text, bits=3))
    other = quantize.run(options(models("llama"), tmp_path / "other", text, bits=3, **settings))
    assert digests(tmp_path / "plain/model") != digests(tmp_path / "other/model")
    config = json.loads((tmp_path / "other/model/config.json").read_text())["quantization_config"]
    assert config["desc_act"] == (settings.get("settings", {}).get("order") == "desc_act")
    assert torch.isfinite(logits(quantcli.load(tmp_path / "other"))).all()
    assert plain.bits_per_weight == other.bits_per_weight


def test_more_bits_are_closer(models, text, tmp_path):
    reference = logits(quantcli.load(models("llama")))
    far = []
    for bits in (2, 3, 4, 8):
        quantize.run(options(models("llama"), tmp_path / str(bits), text, bits=bits))
        far.append(float((logits(quantcli.load(tmp_path / str(bits))) - reference).square().mean()))
    assert far == sorted(far, reverse=True) and far[-1] < 0.01 * far[0]


def test_overrides_exclusions_and_the_head(models, text, tmp_path):
    result = quantize.run(
        options(
            models("llama"), tmp_path / "q", text,
            quantize_lm_head=True,
            exclude=(r"layers\.0\.mlp",),
            overrides=(Override("o_proj", bits=8), Override(r"layers\.1.*down", bits=2, group_size=16, symmetric=True)),
        )
    )  # fmt: skip
    by_name = {layer.name: layer for layer in result.layers}
    assert not any("layers.0.mlp" in name for name in by_name)
    assert by_name["model.layers.0.self_attn.o_proj"].bits == 8
    down = by_name["model.layers.1.mlp.down_proj"]
    assert (down.bits, down.group_size, down.symmetric) == (2, 16, True)
    assert by_name["lm_head"].bits == 4 and by_name["lm_head"].tokens > 0
    model = quantcli.load(tmp_path / "q")
    assert isinstance(model.lm_head, PackedLinear) and model.lm_head.bits == 4
    assert model.get_submodule("model.layers.1.mlp.down_proj").bits == 2
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is torch.nn.Linear


def test_the_range_of_some_linears(models, tmp_path):
    errors = []
    for number, overrides in enumerate(((), (Override("q_proj", clip_ratio=0.5),))):
        result = quantize.run(
            options(models("llama"), tmp_path / str(number), algorithm="rtn", bits=8, overrides=overrides)
        )
        errors.append({layer.name: layer.relative_error for layer in result.layers})
        assert all(layer.rtn_relative_error < 1.5 * errors[0][layer.name] for layer in result.layers)
    for name, error in errors[0].items():
        assert errors[1][name] > 100 * error if name.endswith("q_proj") else errors[1][name] == error


@pytest.mark.parametrize("algorithm", ["kquant", "gptq"])
def test_a_tied_head_gets_codes_of_its_own(algorithm, models, text, tmp_path):
    source = models("llama-tied")
    given = text if algorithm == "gptq" else None
    quantize.run(options(source, tmp_path / "q", given, algorithm=algorithm, quantize_lm_head=True))
    config = json.loads((tmp_path / "q/model/config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["quantization_config"]["lm_head"] is True
    model = quantcli.load(tmp_path / "q")
    table = quantcli.load(source).model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, table)
    assert 0 < (model.lm_head.quantized().dequantize() - table).abs().max() < 0.3 * table.abs().max()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_quantized_embeddings(family, models, tmp_path):
    result = quantize.run(options(models(family), tmp_path / "q", quantize_embeddings=True))
    assert result.layers[-1].name == "model.embed_tokens" and result.layers[-1].bits == 8
    assert torch.isfinite(logits(quantcli.load(tmp_path / "q"))).all()


def test_sharded_bfloat16_input_is_never_changed(tmp_path, text):
    model = families.build("llama").to(torch.bfloat16)
    source = families.save(model, tmp_path / "m", max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    before = digests(source)
    quantize.run(options(source, tmp_path / "q", text))
    assert digests(source) == before
    output = Checkpoint.open(tmp_path / "q/model")
    assert output.entries["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert torch.equal(output.read("model.norm.weight"), Checkpoint.open(source).read("model.norm.weight"))


def test_dtype_of_what_stays_float(models, tmp_path):
    quantize.run(options(models("llama"), tmp_path / "q", dtype="float16"))
    output = Checkpoint.open(tmp_path / "q/model")
    assert output.entries["model.embed_tokens.weight"].dtype == torch.float16
    assert output.config["dtype"] == "float16"


def test_everything_else_travels_along(models, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(models("llama"), source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    quantize.run(options(source, tmp_path / "q"))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "q/model" / name).read_bytes() == (source / name).read_bytes()


def test_a_moved_output_is_the_same_model(models, tmp_path):
    quantize.run(options(models("llama"), tmp_path / "q"))
    before = logits(quantcli.load(tmp_path / "q"))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "q", tmp_path / "elsewhere/moved")
    assert torch.equal(logits(quantcli.load(tmp_path / "elsewhere/moved")), before)
    assert str(tmp_path) not in (tmp_path / "elsewhere/moved/quantcli.json").read_text()


def test_manifest_and_report(models, text, tmp_path):
    result = quantize.run(options(models("llama"), tmp_path / "q", text))
    manifest = read_manifest(tmp_path / "q")
    assert manifest.command == "quantize" and manifest.kind == "checkpoint"
    assert manifest.metrics["bits_per_weight"] == pytest.approx(4 + 20 / 32)
    assert set(manifest.files) == {str(p.relative_to(tmp_path / "q")) for p in (tmp_path / "q").rglob("*")
                                   if p.is_file() and p.name != "quantcli.json"}  # fmt: skip
    report = json.loads((tmp_path / "q/report.json").read_text())
    assert len(report["layers"]) == len(result.layers) == 14
    assert dataclasses.asdict(result.layers[0]).items() <= report["layers"][0].items()
    assert not list(tmp_path.glob("*.partial-*"))


def test_two_runs_are_equal_and_batches_do_not_matter(models, text, tmp_path):
    quantize.run(options(models("llama"), tmp_path / "a", text))
    quantize.run(options(models("llama"), tmp_path / "b", text))
    assert digests(tmp_path / "a/model") == digests(tmp_path / "b/model")


def test_forwards_run_again_give_the_same_codes(models, text, tmp_path, monkeypatch):
    """Little memory changes how often forwards run, not the result."""
    quantize.run(options(models("llama"), tmp_path / "a", text))
    made = make_plan

    def sparing(given):
        return dataclasses.replace(made(given), keep_paused=False)

    monkeypatch.setattr(quantize_checkpoint, "make_plan", sparing)
    quantize.run(options(models("llama"), tmp_path / "b", text))
    assert digests(tmp_path / "a/model") == digests(tmp_path / "b/model")


@pytest.mark.parametrize("settings", [{}, {"correct_earlier": True}, {"preset": "best"}, {"quantize_lm_head": True}])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_run_continues_to_the_same_result(stop_after, settings, models, text, tmp_path, monkeypatch):
    quantize.run(options(models("llama"), tmp_path / "whole", text, **settings))
    remember = Journal.remember

    def interrupted(self, done, streams):
        remember(self, done, streams)
        if done == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "remember", interrupted)
    with pytest.raises(quantcli.errors.InterruptedRunError):
        quantize.run(options(models("llama"), tmp_path / "q", text, **settings))
    assert not (tmp_path / "q").exists()
    monkeypatch.setattr(Journal, "remember", remember)
    with pytest.raises(UsageError, match="bits was 4, is 3"):
        quantize.run(options(models("llama"), tmp_path / "q", text, bits=3, **settings))
    result = quantize.run(options(models("llama"), tmp_path / "q", text, **settings))
    assert digests(tmp_path / "q/model") == digests(tmp_path / "whole/model")
    assert len(result.layers) == 14 + settings.get("quantize_lm_head", False)


def test_a_dry_run_does_nothing_and_tells_the_size(models, text, tmp_path):
    plan = quantize.run(options(models("llama"), tmp_path / "q", text, dry_run=True))
    assert not (tmp_path / "q").exists() and not list(tmp_path.iterdir())
    result = quantize.run(options(models("llama"), tmp_path / "q", text))
    assert result.size_bytes == pytest.approx(plan.size_bytes, rel=0.1)
    assert {"estimated size", "estimated peak memory", "estimated time"} <= {name for name, _ in plan.rows()}


def test_experts_that_no_token_reached_are_quantized_without_data(models, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("a" * 400)
    calibration = CalibrationOptions(str(few), num_samples=1, seq_len=32)
    result = quantize.run(
        QuantizeOptions(str(models("mixtral")), tmp_path / "q", "gptq", group_size=32, calibration=calibration)
    )
    used = {layer.algorithm for layer in result.layers}
    assert used == {"gptq", "kquant"}
    assert torch.isfinite(logits(quantcli.load(tmp_path / "q"))).all()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"algorithm": "gtpq"}, UsageError, "did you mean 'gptq'"),
        ({"bits": 7, "algorithm": "gptq", "calibrated": True}, UsageError, "gptq makes 2, 3, 4, 5, 6, 8 bits, not 7"),
        ({"preset": "best", "algorithm": "rtn"}, UsageError, "preset best is a setting of gptq"),
        ({"exclude": ("nothing_is_named_so",)}, UsageError, "no linear is named like"),
        ({"exclude": (".",)}, UsageError, "leaves nothing"),
        ({"overrides": (Override("o_proj", bits=7),), "calibrated": True}, UsageError, "not 7 as overridden"),
        (
            {"algorithm": "kquant", "overrides": (Override("o_proj", clip_ratio=0.9),)},
            UsageError,
            "kquant has no clip_ratio, rtn has",
        ),
        (
            {"algorithm": "rtn", "overrides": (Override("o_proj", clip_ratio=0.0),)},
            UsageError,
            "clip_ratio is above 0",
        ),
        ({"correct_earlier": True}, UsageError, "a step of gptq"),
        ({"max_memory": 1000}, ResourceError, "the run needs about"),
        ({"model": "/no/such/folder"}, InputError, "does not exist"),
        ({"device": "cuda:99"}, UsageError, "there is no cuda:99"),
        ({"settings": {"damp_procent": "1"}, "calibrated": True}, UsageError, "did you mean 'damp_percent'"),
    ],
)
def test_what_cannot_be_is_refused(values, error, message, models, text, tmp_path):
    values = dict(values)
    given = text if values.pop("calibrated", False) else None
    with pytest.raises(error, match=message):
        quantize.run(options(values.pop("model", models("llama")), tmp_path / "q", given, **values))
    assert not list(tmp_path.iterdir())


def test_text_options_without_text_are_refused(models, tmp_path):
    given = QuantizeOptions(
        str(models("llama")), tmp_path / "q", "rtn", group_size=32, calibration=CalibrationOptions(num_samples=3)
    )
    with pytest.raises(UsageError, match="--num-samples would have no effect"):
        quantize.run(given)


def test_quantized_input_is_refused(models, tmp_path):
    quantize.run(options(models("llama"), tmp_path / "q"))
    with pytest.raises(InputError, match=r"already quantized \(gptq\)"):
        quantize.run(options(tmp_path / "q", tmp_path / "again"))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_streams_are_what_the_models_compute(family, models, text, tmp_path, ran):
    """The quantized stream ends where the written model does, the float stream where the float model does.

    With experts as well, and over a block in which nothing is quantized.
    """
    last = make_plan(options(models(family), tmp_path / "none", text)).layout.blocks[-1]
    for number, exclude in enumerate(((), (r"\.0\.",))):
        output = tmp_path / str(number)
        quantize.run(options(models(family), output, text, correct_earlier=True, exclude=exclude, bits=3))
        for stream, folder in (("hidden", output), ("float_hidden", models(family))):
            found = block_output(quantcli.load(folder), last, ran.tokens)
            worst = float((getattr(ran, stream) - found).abs().max())
            assert worst < 1e-3 * float(found.abs().max()), (stream, exclude, worst)


def block_output(model, block, tokens):
    seen = []
    model.get_submodule(block).register_forward_hook(
        lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
    return seen[0]
