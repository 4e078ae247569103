"""Mixed bits: what is measured, what is chosen for it, and what becomes of the choice."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import families
import quantcli
from quantcli.data.calibration import calibration_rows
from quantcli.errors import InterruptedRunError, UsageError
from quantcli.models.linear import PackedLinear
from quantcli.options import CalibrationOptions, Override, QuantizeOptions
from quantcli.pipelines import quantize, quantize_checkpoint
from quantcli.pipelines.blockwise.journal import Journal
from quantcli.pipelines.mixed_bits import choose as mixed
from quantcli.pipelines.mixed_bits.sensitivity import REFERENCE_BITS, measure
from quantcli.pipelines.planning.decide import make_plan
from quantcli.progress import Silent
from quantcli.tensors.affine import round_to_grid, searched_grid
from tiny import digests

SENSITIVE = "model.layers.1."


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A model in which the second block says nearly all."""
    model = families.build("llama")
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(2.0 if name.startswith(SENSITIVE) else 0.02)
    return families.save(model, tmp_path_factory.mktemp("uneven") / "m")


def options(model, output, text=None, **values):
    calibration = CalibrationOptions()
    if text is not None:
        calibration = CalibrationOptions(str(text), num_samples=8, seq_len=32)
    values.setdefault("algorithm", "gptq" if text else "rtn")
    values.setdefault("group_size", 32)
    values.setdefault("dtype", "keep")
    return QuantizeOptions(str(model), Path(output), calibration=calibration, **values)


def log_probabilities(folder):
    tokens = torch.randint(3, families.VOCABULARY, (4, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return quantcli.load(folder)(tokens).logits.log_softmax(-1)


def divergence(folder, original):
    reference, found = log_probabilities(original), log_probabilities(folder)
    return float((reference.exp() * (reference - found)).sum(-1).mean())


def bits_of(result):
    return {layer.name.removeprefix("model.layers."): layer.bits for layer in result.layers}


def measured(folder, text, output, **values):
    """What `measure` gives, and the text that it read."""
    plan = make_plan(options(folder, output, text, target_bits=4.0, **values))
    tokens = calibration_rows(
        plan.options.calibration, plan.folder, model_digest=plan.model_digest, progress=Silent()
    ).tokens
    with torch.inference_mode():
        widths = {name: tuple(sizes) for name, sizes in plan.budget.sizes.items()}
        return plan, tokens, measure(plan, widths, tokens, Silent())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_costs_equal_a_literal_measurement(family, models, text, tmp_path):
    """Errors by an explicit Hessian, a block's KL by a forward of the whole model, shares by what each group moves."""
    plan, tokens, found = measured(models(family), text, tmp_path / "q")
    model = quantcli.load(models(family))
    linears = {name: model.get_submodule(name) for name in plan.targets}
    block_outputs, inputs = {}, {}

    def weight_of(name):
        module = linears[name]
        return module.weight.data.T.contiguous() if plan.targets[name].transposed else module.weight.data

    def put(name, weight):
        linears[name].weight.data = weight.T.contiguous() if plan.targets[name].transposed else weight

    def note_output(path):
        def hook(_module, _args, out):
            block_outputs[path] = (out[0] if isinstance(out, tuple) else out).clone()

        return hook

    for path in plan.layout.blocks:
        model.get_submodule(path).register_forward_hook(note_output(path))
    note = [
        module.register_forward_pre_hook(
            lambda _module, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1))
        )
        for name, module in linears.items()
    ]

    def run():
        with torch.no_grad():
            return model(tokens, use_cache=False).logits.log_softmax(-1)[:, :-1].double()

    reference = run()
    float_outputs, float_weights = dict(block_outputs), {name: weight_of(name) for name in linears}
    for hook in note:
        hook.remove()
    errors, rounded = {}, {}
    for name, weight in float_weights.items():
        x = inputs[name]
        hessian = x.T @ x / len(x)
        importance = (weight.abs() + weight.square().mean(1, keepdim=True).sqrt()) * hessian.diagonal()
        for bits in {*plan.budget.sizes[name], REFERENCE_BITS}:
            scheme = replace(plan.targets[name].scheme, bits=bits)
            result = round_to_grid(weight, *searched_grid(weight, scheme, importance, steps=20), scheme).dequantize()
            error = weight - result
            errors[name, bits] = float(
                torch.trace(error @ hessian @ error.T) / torch.trace(weight @ hessian @ weight.T)
            )
            if bits == REFERENCE_BITS:
                rounded[name] = result
    for path in plan.layout.blocks:
        members = [names for names in found.groups if names[0].startswith(path + ".")]
        moved = []
        for names in members:
            for name in names:
                put(name, rounded[name])
            run()
            moved.append(float((block_outputs[path] - float_outputs[path]).square().sum()))
            for name in names:
                put(name, float_weights[name])
        for name in rounded:
            if name.startswith(path + "."):
                put(name, rounded[name])
        perturbed = run()
        for name, weight in float_weights.items():
            put(name, weight)
        kl = float((reference.exp() * (reference - perturbed)).sum(-1).mean())
        for names, share in zip(members, moved, strict=True):
            total = sum(errors[name, REFERENCE_BITS] for name in names)
            for name in names:
                for bits, cost in found.costs[name].items():
                    expected = kl * share / sum(moved) * errors[name, bits] / total
                    assert cost == pytest.approx(expected, rel=2e-3), (name, bits)
    assert found.tokens == tokens.numel()


@pytest.mark.parametrize("target", [3.4, 4.0, 5.5, 7.0])
def test_the_average_is_met(target, models, text, tmp_path):
    result = quantize.run(options(models("llama"), tmp_path / "q", text, target_bits=target, group_size=64))
    assert 0.99 * target <= result.bits_per_weight <= target
    weights = sum(layer.parameters for layer in result.layers)
    stored = sum(layer.parameters * layer.bits for layer in result.layers) / weights
    assert stored < result.bits_per_weight  # scales and zeros count


@pytest.mark.parametrize("settings", [{}, {"quantize_lm_head": True}, {"exclude": (r"0\.mlp",)}, {"dtype": "float16"}])
def test_the_size_is_met(settings, models, text, tmp_path):
    """What stays float counts, headers as well."""
    low, high = size_range(options(models("llama"), tmp_path / "q", text, target_size=1, **settings))
    target = int(low + 0.4 * (high - low))
    result = quantize.run(options(models("llama"), tmp_path / "q", text, target_size=target, **settings))
    written = sum(p.stat().st_size for p in (tmp_path / "q/model").glob("*.safetensors"))
    assert 0.99 * target <= written == result.size_bytes <= target


def size_range(given):
    """The reachable sizes, from what an impossible target is refused with."""
    with pytest.raises(UsageError, match="out of reach") as refused:
        make_plan(given)
    low, high = re.search(r"([\d.]+) to ([\d.]+) MB can", refused.value.message).groups()
    return float(low) * 1e6, float(high) * 1e6


@pytest.mark.parametrize("family", ["llama-tied", "phi3", "mixtral", "opt"])
def test_linears_of_one_input_share_their_bits(family, models, text, tmp_path):
    bits = bits_of(quantize.run(options(models(family), tmp_path / "q", text, target_bits=4.3)))
    assert len(set(bits.values())) > 1
    shared = 0
    for number in {name.split(".")[0] for name in bits} & {"0", "1"}:
        for leaves in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("w2",)):
            found = [b for name, b in bits.items() if name.startswith(number) and name.endswith(leaves)]
            assert len(set(found)) <= 1, (number, leaves)
            shared += len(found) > 1
    assert shared or family in ("phi3", "opt")


def test_the_written_bits_are_those_chosen(uneven, text, tmp_path):
    result = quantize.run(options(uneven, tmp_path / "q", text, target_bits=4.3))
    told = json.loads((tmp_path / "q/report.json").read_text())["plan"]["mixed_bits"]
    bits = {layer.name: layer.bits for layer in result.layers}
    assert {name: told["linears"][name]["bits"] for name in bits} == bits
    model = quantcli.load(tmp_path / "q")
    assert {n: m.bits for n, m in model.named_modules() if isinstance(m, PackedLinear)} == bits
    assert told["achieved"] == pytest.approx(result.bits_per_weight) and told["target"] == 4.3
    assert sum(part["linears"] for part in told["distribution"]) == 14
    assert sum(part["share"] for part in told["distribution"]) == pytest.approx(1)
    config = json.loads((tmp_path / "q/model/config.json").read_text())["quantization_config"]
    linears = {part["bits"]: part["linears"] for part in told["distribution"]}
    assert linears[config["bits"]] == max(linears.values())
    rules = [rule for rule in config["dynamic"] if not re.search("qkv_proj|gate_up_proj", rule)]
    assert len(rules) == 14 - linears[config["bits"]]


def test_a_block_that_matters_more_gets_more_bits(uneven, text, tmp_path):
    bits = bits_of(quantize.run(options(uneven, tmp_path / "q", text, target_bits=4.3)))
    first, second = (sum(b for name, b in bits.items() if name.startswith(number)) for number in ("0.", "1."))
    assert second > 1.5 * first


@pytest.mark.parametrize("algorithm", ["rtn", "kquant", "hqq", "gptq", "awq", "quarot,rtn"])
def test_mixed_is_closer_than_uniform_of_the_same_size(algorithm, uneven, text, tmp_path):
    given = text if algorithm in ("gptq", "awq") else None
    uniform = quantize.run(options(uneven, tmp_path / "uniform", given, bits=3, algorithm=algorithm))
    target = uniform.bits_per_weight
    result = quantize.run(options(uneven, tmp_path / "q", given, target_bits=target, algorithm=algorithm))
    assert result.bits_per_weight <= target
    assert divergence(tmp_path / "q", uneven) < 0.7 * divergence(tmp_path / "uniform", uneven)


def test_overrides_and_exclusions_win(uneven, text, tmp_path):
    result = quantize.run(
        options(
            uneven, tmp_path / "q", text, target_bits=4.6, mixed_bits=(2, 4, 8), exclude=("1.*o_proj",),
            overrides=(Override("v_proj", bits=8), Override(r"0\.mlp\.down", bits=3), Override("gate", group_size=16)),
        )
    )  # fmt: skip
    bits = bits_of(result)
    assert {b for name, b in bits.items() if "v_proj" in name} == {8}
    assert bits["0.mlp.down_proj"] == 3
    assert "1.self_attn.o_proj" not in bits
    assert {b for n, b in bits.items() if "v_proj" not in n and n != "0.mlp.down_proj"} <= {2, 4, 8}
    assert all(bits[f"{n}.self_attn.q_proj"] == bits[f"{n}.self_attn.k_proj"] for n in (0, 1))
    assert all(bits[f"{n}.mlp.gate_proj"] == bits[f"{n}.mlp.up_proj"] for n in (0, 1))
    assert {layer.group_size for layer in result.layers if "gate" in layer.name} == {16}
    assert 0.99 * 4.6 <= result.bits_per_weight <= 4.6


def test_the_head_and_the_embedding_count(uneven, text, tmp_path):
    result = quantize.run(
        options(uneven, tmp_path / "q", text, target_bits=5.5, quantize_lm_head=True, quantize_embeddings=True)
    )
    assert 0.99 * 5.5 <= result.bits_per_weight <= 5.5
    told = result.plan["mixed_bits"]["linears"]
    assert told["lm_head"]["expected_kl"][2] > told["lm_head"]["expected_kl"][8] > 0


def test_experts_of_a_block_share_their_bits(models, tmp_path):
    """Those that no token reached as well."""
    few = tmp_path / "few.txt"
    few.write_text("a" * 400)
    given = options(models("mixtral"), tmp_path / "q", few, target_bits=4.3)
    given = replace(given, calibration=CalibrationOptions(str(few), num_samples=1, seq_len=32))
    bits = bits_of(quantize.run(given))
    for number in "01":
        for leaves in (("w1", "w3"), ("w2",), ("gate_proj", "up_proj"), ("down_proj",)):
            assert len({b for n, b in bits.items() if n.startswith(number) and n.endswith(leaves)}) <= 1


@pytest.mark.parametrize("stop", ["chosen", 1])
def test_an_interrupted_run_keeps_its_choice(stop, uneven, text, tmp_path, monkeypatch):
    quantize.run(options(uneven, tmp_path / "whole", text, target_bits=4.3))
    remember = Journal.remember

    def interrupted(self, done, streams):
        remember(self, done, streams)
        raise KeyboardInterrupt

    def interrupted_early(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stop == "chosen":
            patch.setattr(quantize_checkpoint, "begin_streams", interrupted_early)
        else:
            patch.setattr(Journal, "remember", interrupted)
        with pytest.raises(InterruptedRunError):
            quantize.run(options(uneven, tmp_path / "q", text, target_bits=4.3))
    with pytest.raises(UsageError, match=r"target_bits was 4\.3, is 4\.4"):
        quantize.run(options(uneven, tmp_path / "q", text, target_bits=4.4))

    def measured_again(*_):
        raise AssertionError("it was measured already")

    monkeypatch.setattr(mixed, "measure", measured_again)
    quantize.run(options(uneven, tmp_path / "q", text, target_bits=4.3))
    assert digests(tmp_path / "q/model") == digests(tmp_path / "whole/model")


def test_a_dry_run_measures_nothing(models, text, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed, "measure", None)
    plan = quantize.run(options(models("llama"), tmp_path / "q", text, target_bits=4.0, dry_run=True))
    rows = dict(plan.rows())
    assert "at most 4.000 stored bits" in rows["mixed bits"] and "is measured first" in rows["mixed bits"]
    assert rows["scheme"].startswith("2, 3, 4, 8 bits")
    told = plan.to_dict()["mixed_bits"]
    assert told["target"] == 4.0 and told["reachable"] == pytest.approx([2 + 18 / 32, 8 + 24 / 32])
    monkeypatch.undo()
    result = quantize.run(options(models("llama"), tmp_path / "q", text, target_bits=4.0))
    assert result.size_bytes == pytest.approx(plan.size_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_bits": 2.0}, r"--target-bits 2\.000 .* out of reach: with 2, 3, 4, 8 bits, 2\.562 to 8\.750"),
        ({"target_bits": 9.0}, "out of reach"),
        ({"target_size": 1000}, "--target-size 0.001 MB is out of reach"),
        ({"target_size": 10**9}, "out of reach"),
        ({"target_bits": 3.0, "format": "awq"}, "widths cannot be mixed: format awq"),
        ({"target_bits": 4.0, "algorithm": "nf4"}, "widths cannot be mixed: nf4 makes 4 bits"),
        ({"target_size": 10**6, "format": "float"}, "does not depend on the bits"),
        ({"target_bits": 4.0, "mixed_bits": (4, 7)}, "7 bits cannot be mixed in: gptq makes 2, 3, 4, 5, 6, 8 bits"),
        ({"target_bits": 4.0, "overrides": (Override(".", bits=4),)}, "has nothing to choose"),
    ],
)
def test_what_cannot_be_is_refused(values, message, models, text, tmp_path):
    with pytest.raises(UsageError, match=message):
        quantize.run(options(models("llama"), tmp_path / "q", None if "algorithm" in values else text, **values))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixed_bits": (3, 4)}, "--mixed-bits needs a target"),
        ({"target_bits": 4.0, "target_size": 10**6}, "exclude each other"),
        ({"target_bits": 4.0, "bits": 3}, "--bits and --target-bits exclude each other"),
        ({"target_bits": 4.0, "mixed_bits": (4, 4)}, "two different numbers"),
        ({"target_bits": 4.0, "mixed_bits": (4, 9)}, "are 1 to 8, got 4, 9"),
        ({"target_bits": -1.0}, "above 0"),
    ],
)
def test_options_that_contradict_each_other(values, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        options(tmp_path, tmp_path / "q", **values)


def test_text_is_read_for_measuring_alone(uneven, text, tmp_path):
    """Without data an algorithm has no use for text; a target has."""
    calibration = CalibrationOptions(str(text), seq_len=32)
    given = QuantizeOptions(str(uneven), tmp_path / "q", "rtn", group_size=32, calibration=calibration)
    with pytest.raises(UsageError, match="--data would have no effect"):
        quantize.run(given)
    result = quantize.run(replace(given, target_bits=4.3))
    assert result.plan["mixed_bits"]["measured_tokens"] == 1024
    assert all(layer.tokens == 0 for layer in result.layers)
    with pytest.raises(UsageError, match="--num-samples would have no effect"):
        quantize.run(replace(given, target_bits=4.3, calibration=replace(calibration, num_samples=8)))
