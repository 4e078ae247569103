"""`quantize` with a transform in front: the function is kept, and what is written is what ran."""

from pathlib import Path

import pytest
import torch
import transformers

import families
import quantcli
import tiny
from quantcli.algorithms import ALGORITHMS
from quantcli.errors import InputError, UsageError
from quantcli.models.checkpoint import Checkpoint
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines import quantize
from quantcli.pipelines.planning.decide import make_plan

TRANSFORMS = [a.name for a in ALGORITHMS.values() if a.kind == "transform" and a.scope == "stage"]
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
NORMS = ("norm.weight", "ln_1.weight", "ln_2.weight", "layernorm.weight", "layer_norm.weight")


def options(model, output, text, **values):
    values.setdefault("group_size", 32)
    values.setdefault("readers", ("quantcli",))
    calibration = CalibrationOptions(str(text), num_samples=8, seq_len=32, batch_size=2)
    return QuantizeOptions(str(model), Path(output), calibration=calibration, **values)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_is_written_is_what_ran(family, transform, models, text, tmp_path, ran):
    """The loaded folder's last block gives the hidden states that the run ended with; at 8 bits, nearly the model's."""
    source = models(family)
    result = quantize.run(options(source, tmp_path / "q", text, algorithm=f"{transform},kquant", bits=8))
    scaled = [layer.scaled for layer in result.layers]
    assert any(scaled)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "q/model")
    gains = [n for n in after.entries if n in before and n.endswith(NORMS)]
    # no norm of OLMo 2 stands before a linear: v and up are scaled there, and nothing else
    assert any(not torch.equal(before.read(n), after.read(n)) for n in gains) == (family != "olmo2")
    loaded, original = quantcli.load(tmp_path / "q"), quantcli.load(source)
    last = make_plan(options(source, tmp_path / "r", text)).layout.blocks[-1]
    found, wanted = (outputs(m, last, ran.tokens) for m in (loaded, original))
    size = wanted.square().mean().sqrt()
    away = (found - ran.hidden).abs().amax(-1) > 2e-3 * wanted.abs().max()
    # a token whose experts are nearly level may take another one, and the rest of its row sees that
    assert away.float().mean() <= (1 / len(away) if family in MIXTURES else 0)
    assert (found - wanted).square().mean().sqrt() < 0.05 * size


def outputs(model, block, tokens):
    seen = []
    hook = model.get_submodule(block).register_forward_hook(
        lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("exclude", "told"), [((), 0), (("mlp", "o_proj"), 1)])
def test_a_transform_without_effect_is_told(exclude, told, models, text, tmp_path):
    warnings = tiny.Warnings()
    quantize.run(options(models("olmo2"), tmp_path / "q", text, algorithm="awq", exclude=exclude), warnings)
    assert warnings.said == ["awq had no effect: nothing in front of these linears takes a division"] * told


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("chain", ["awq", "awq,gptq", "awq,rtn", "smoothquant,gptq"])
def test_chains(chain, dtype, models, text, tmp_path):
    result = quantize.run(options(models("llama"), tmp_path / "q", text, algorithm=chain, dtype=dtype))
    rounder = (chain + ",kquant").split(",")[1]
    assert {layer.algorithm for layer in result.layers} == {rounder}
    plain = (
        quantize.run(options(models("llama"), tmp_path / "p", text, algorithm=rounder, dtype=dtype))
        if rounder != "rtn"
        else None
    )
    if plain is not None:
        total = [sum(layer.relative_error for layer in r.layers) for r in (result, plain)]
        assert total[0] < 1.1 * total[1]
    gain = Checkpoint.open(tmp_path / "q/model").entries["model.layers.0.input_layernorm.weight"]
    assert gain.dtype == (torch.float32 if dtype == "keep" else torch.bfloat16)


def test_a_producer_that_stays_float_is_divided_too(models, text, tmp_path):
    source = models("llama")
    quantize.run(
        options(source, tmp_path / "q", text, algorithm="awq", bits=8, exclude=("v_proj", "up_proj"), dtype="keep")
    )
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "q/model")
    name = "model.layers.1.mlp.up_proj.weight"
    ratio = before.read(name) / after.read(name)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3) and ratio.std() > 0
    with torch.no_grad():
        tokens = torch.arange(3, 40)[None]
        found, wanted = (quantcli.load(f)(tokens).logits for f in (tmp_path / "q", source))
    assert (found - wanted).square().mean() < 0.01 * wanted.square().mean()


def test_stopped_and_continued(models, text, tmp_path, stopped):
    settings = {"algorithm": "awq,gptq", "bits": 3}
    quantize.run(options(models("llama"), tmp_path / "whole", text, **settings))
    with stopped():
        quantize.run(options(models("llama"), tmp_path / "q", text, **settings))
    quantize.run(options(models("llama"), tmp_path / "q", text, **settings))
    whole, again = Checkpoint.open(tmp_path / "whole/model"), Checkpoint.open(tmp_path / "q/model")
    assert whole.entries.keys() == again.entries.keys()
    assert all(torch.equal(whole.read(n), again.read(n)) for n in whole.entries)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": "gptq,awq"}, "gptq rounds, nothing can follow it"),
        ({"algorithm": "awq,awq"}, "named twice"),
        ({"algorithm": "awq,gtpq"}, "did you mean 'gptq'"),
        ({"algorithm": "awq", "preset": "best"}, "preset best is a setting of gptq, not of kquant"),
        ({"algorithm": "awq", "settings": {"n_grit": "3"}}, "no option 'n_grit'"),
        ({"algorithm": "awq", "settings": {"gptq.order": "none"}}, "is for 'gptq', which does not run"),
        ({"algorithm": "awq", "correct_earlier": True}, "--correct-earlier is a step of gptq"),
    ],
)
def test_refusals(values, message, models, text, tmp_path):
    with pytest.raises(UsageError, match=message):
        make_plan(options(models("llama"), tmp_path / "q", text, **values))


def test_options_reach_the_member_that_has_them(models, text, tmp_path):
    settings = {"n_grid": "7", "gptq.order": "none", "damp_percent": "0.02"}
    plan = make_plan(options(models("llama"), tmp_path / "q", text, algorithm="awq,gptq", settings=settings))
    assert plan.transforms[0].settings.n_grid == 7
    assert (plan.settings.order, plan.settings.damp_percent) == ("none", 0.02)
    assert dict(plan.rows())["transform"].startswith("awq (n_grid=7")


# -- rotations --------------------------------------------------------------------------------------------------------


def logits(folder, dtype):
    model = quantcli.load(folder, dtype=dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # grouped products know no float64
        families.norms_in_float64(model)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("mode", ["hadamard", "random"])
@pytest.mark.parametrize("family", families.ROTATABLE)
def test_a_rotated_model_computes_the_same(family, mode, tmp_path):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        source = tmp_path / f"source-{dtype}"
        families.save(noisy(families.build(family)).to(dtype), source)
        output = tmp_path / f"rotated-{dtype}"
        quantize.run(QuantizeOptions(str(source), output, "quarot", settings={"rotate_mode": mode}))
        before, after = Checkpoint.open(source), Checkpoint.open(output / "model")
        assert before.config.get("quantization_config") is after.config.get("quantization_config") is None
        changed = [n for n in before.entries if not torch.equal(before.read(n), after.read(n))]
        assert len(changed) > 0.8 * len(before.entries) - 12
        assert all(entry.dtype == dtype for entry in after.entries.values())
        wanted, found = logits(source, dtype), logits(output, dtype)
        assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.parametrize("family", families.ROTATABLE)
def test_rotated_weights_are_rounded_once(family, tmp_path):
    """However many rotations a matrix goes through, it ends within half a unit in the last place of bfloat16."""
    model, rotated = noisy(families.build(family)), []
    for dtype in (torch.bfloat16, torch.float64):  # the same numbers
        source, output = (tmp_path / f"{name}-{dtype}" for name in ("source", "rotated"))
        families.save(model.to(dtype), source)
        quantize.run(QuantizeOptions(str(source), output, "quarot", settings={"online": "true"}))
        rotated.append(Checkpoint.open(output / "model"))
    half, exact = rotated
    for name in exact.entries:
        assert half.entries[name].dtype == torch.bfloat16
        wanted = exact.read(name)
        unit = torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted).exponent - 8)
        # torch rounds float64 to bfloat16 by way of float32
        assert ((half.read(name).double() - wanted).abs() <= unit / 2 * (1 + 2**-14)).all(), name


def noisy(model):
    """Gains and biases that matter."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gpt2", "its norms subtract the mean"),
        ("opt", "its norms subtract the mean"),
        ("gemma2", "norms between its linears and the residual stream"),
        ("olmo2", "not known which"),
    ],
)
def test_models_that_cannot_be_rotated(family, why, models, tmp_path):
    with pytest.raises(InputError, match=why):
        quantize.run(QuantizeOptions(str(models(family)), tmp_path / "q", "quarot"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chain", ["quarot,rtn", "quarot,gptq", "quarot,awq,gptq"])
def test_rotated_models_are_quantized(chain, models, text, tmp_path):
    source = models("llama-tied")
    run = options(source, tmp_path / "q", text, algorithm=chain, bits=8)
    if chain == "quarot,rtn":
        run = QuantizeOptions(str(source), tmp_path / "q", chain, bits=8, group_size=32)
    quantize.run(run)
    wanted, found = logits(source, torch.float32), logits(tmp_path / "q", torch.float32)
    assert (found - wanted).square().mean() < 0.01 * wanted.square().mean()
    config = Checkpoint.open(tmp_path / "q/model").config
    assert config["tie_word_embeddings"] is False


def test_outliers_are_spread(models, text, tmp_path):
    """A residual stream with two loud channels: rotated, the same bits cost far less."""
    source = tmp_path / "loud"
    model = families.build("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("layernorm.weight", "model.norm.weight")):
                parameter.fill_(1.0)
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                parameter[:, [3, 40]] *= 12
    families.save(model, source)
    plain, turned = (
        quantize.run(QuantizeOptions(str(source), tmp_path / chain, chain, bits=3, group_size=-1))
        for chain in ("rtn", "quarot,rtn")
    )
    errors = [sum(x.relative_error for x in r.layers if x.kind in ("q_proj", "gate_proj")) for r in (plain, turned)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": "quarot", "bits": 3}, "bits would have no effect"),
        ({"algorithm": "quarot", "format": "awq"}, "quarot alone writes a float model"),
        ({"algorithm": "awq,quarot,gptq"}, "cannot be combined"),
        ({"algorithm": "quarot,rtn", "settings": {"rotate_mode": "dct"}}, "rotate_mode is one of hadamard, random"),
    ],
)
def test_refusals_of_rotations(values, message, models, tmp_path):
    with pytest.raises(UsageError, match=message):
        make_plan(QuantizeOptions(str(models("llama")), tmp_path / "q", **values))


def test_the_preset_best_scales_first(models, text, tmp_path):
    steps = {"refit": "true", "sweeps": "2"}
    spelled = quantize.run(options(models("llama"), tmp_path / "a", text, algorithm="awq,gptq", settings=steps))
    preset = quantize.run(options(models("llama"), tmp_path / "b", text, preset="best"))
    alone = quantize.run(options(models("llama"), tmp_path / "c", text, algorithm="gptq", preset="best"))
    mixed = quantize.run(options(models("llama"), tmp_path / "d", text, preset="best", target_bits=3.9))
    a, b, c = (Checkpoint.open(tmp_path / n / "model") for n in "abc")
    assert all(torch.equal(a.read(n), b.read(n)) for n in a.entries)
    assert not all(torch.equal(a.read(n), c.read(n)) for n in a.entries)
    assert any(layer.scaled for layer in preset.layers) and not any(layer.scaled for layer in alone.layers)
    assert any(layer.scaled for layer in mixed.layers) and len({layer.bits for layer in mixed.layers}) > 1
    assert spelled.bits_per_weight == preset.bits_per_weight


@pytest.mark.parametrize(
    ("width", "values", "expected"),
    [
        (128, {"algorithm": "awq"}, 128),
        (128, {"algorithm": "awq,gptq"}, 128),
        (64, {"algorithm": "awq"}, 64),  # 128 would leave linears whose groups are ragged
        (128, {"algorithm": "gptq"}, 64),
        (128, {"preset": "best"}, 64),
        (128, {"algorithm": "awq", "group_size": 32}, 32),
    ],
)
def test_default_group_size(width, values, expected, text, tmp_path):
    torch.manual_seed(0)
    config = families.KNOWN["llama"]()
    config.hidden_size, config.intermediate_size, config.head_dim = width, 2 * width, width // 4
    model = families.save(transformers.LlamaForCausalLM(config), tmp_path / "model")
    asked = QuantizeOptions(str(model), tmp_path / "q", calibration=CalibrationOptions(str(text)), **values)
    plan = make_plan(asked)
    assert {target.scheme.group_size for target in plan.targets.values()} == {expected}
    assert plan.options.group_size == expected
