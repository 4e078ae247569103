"""LoRA beside packed linears: gradients of the dequantized model, and adapters that plain peft opens."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import families
import tiny
from quantcli.errors import InputError, UsageError
from quantcli.finetune.lora import PackedLoraLinear, add_lora, find_targets, open_lora, save_lora
from quantcli.models.linear import QuantizedLinear
from quantcli.models.load import load
from quantcli.options import QuantizeOptions
from quantcli.pipelines import quantize

# peft asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.tensor([[3, 50, 7, 99, 12, 1, 45]])
ALGORITHMS = ["kquant", "nf4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("lora") / "float")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """Folders of the same model, by the algorithm that quantized it."""
    root = tmp_path_factory.mktemp("packed")
    for algorithm in ALGORITHMS:
        quantize.run(QuantizeOptions(str(source), root / algorithm, algorithm, group_size=32))
    return root


def dequantized(model):
    """Replaces packed linears by float ones of the same weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.dequantize()
            if module.bias is not None:
                linear.bias.data = module.bias.data
            model.set_submodule(name, linear)
    return model


def shaken(model):
    """B starts as zero, which hides A's gradient and the adapter itself."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model):
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_fresh_adapter_changes_nothing(packed, algorithm):
    before = load(packed / algorithm)(TOKENS).logits
    adapted = add_lora(load(packed / algorithm), r=4, alpha=8)
    assert torch.equal(adapted(TOKENS).logits, before)
    assert any(isinstance(m, PackedLoraLinear) for m in adapted.modules())
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {
        n for n, _ in adapted.named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_are_those_of_the_dequantized_model(packed, algorithm):
    ours = gradients(shaken(add_lora(load(packed / algorithm), r=4, alpha=8)))
    theirs = gradients(shaken(add_lora(dequantized(load(packed / algorithm)), r=4, alpha=8)))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 2 * 7  # A and B, two blocks, seven linears
    for name, gradient in ours.items():
        assert gradient.norm() > 0
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_dora_is_that_of_the_dequantized_model(tmp_path, model_type):
    tiny.checkpoint(tmp_path / "float", model_type)
    quantize.run(QuantizeOptions(str(tmp_path / "float"), tmp_path / "q", "kquant", group_size=32))
    before = load(tmp_path / "q")(TOKENS).logits
    fresh = add_lora(load(tmp_path / "q"), r=4, alpha=8, use_dora=True)
    torch.testing.assert_close(fresh(TOKENS).logits, before, rtol=1e-5, atol=1e-5)
    ours = shaken(fresh)
    theirs = shaken(add_lora(dequantized(load(tmp_path / "q")), r=4, alpha=8, use_dora=True))
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert (ours(TOKENS).logits - before).abs().max() > 0.01
    found, expected = gradients(ours), gradients(theirs)
    assert found.keys() == expected.keys()
    assert any("lora_magnitude_vector" in name for name in found)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
    save_lora(ours, tmp_path / "adapter", tmp_path / "base")
    again = open_lora(load(tmp_path / "q"), tmp_path / "adapter")
    torch.testing.assert_close(again(TOKENS).logits, ours.eval()(TOKENS).logits, rtol=1e-6, atol=1e-6)


def test_dora_beside_float_linears_that_stand_the_other_way(tmp_path):
    tiny.checkpoint(tmp_path / "float", "gpt2")
    quantize.run(QuantizeOptions(str(tmp_path / "float"), tmp_path / "q", "rtn", group_size=32, exclude=("mlp",)))
    adapted = add_lora(load(tmp_path / "q"), r=4, alpha=8, use_dora=True)
    assert {type(m.get_base_layer()).__name__ for m in adapted.modules() if hasattr(m, "lora_A")} == {
        "PackedLinear",
        "Conv1D",
    }
    torch.testing.assert_close(adapted(TOKENS).logits, load(tmp_path / "q")(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
@pytest.mark.parametrize("rows", [3, 40])  # few rows are multiplied by another kernel than many
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradcheck_of_one_adapted_layer(packed, algorithm, rows):
    adapted = shaken(add_lora(load(packed / algorithm), r=2, alpha=4, target_modules=["q_proj"]))
    layer = next(m for m in adapted.modules() if isinstance(m, PackedLoraLinear))
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
    # the layer is linear in x: a long step loses nothing, and single precision loses little
    assert torch.autograd.gradcheck(
        lambda x: layer(x).float(), x, eps=0.25, atol=1e-3, rtol=1e-3, fast_mode=True, check_undefined_grad=False
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_plain_peft_opens_the_adapter_on_the_float_model(source, packed, tmp_path, algorithm):
    adapted = shaken(add_lora(load(packed / algorithm), r=4, alpha=8))
    save_lora(adapted, tmp_path / "adapter", tmp_path / "base")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    plain = peft.PeftModel.from_pretrained(dequantized(load(packed / algorithm)), tmp_path / "adapter")
    assert (plain(TOKENS).logits - adapted.eval()(TOKENS).logits).abs().max() < 1e-4
    on_float = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "adapter")
    with on_float.disable_adapter():
        base = on_float(TOKENS).logits
    assert (on_float(TOKENS).logits - base).abs().max() > 0.01


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_adapter_of_the_float_model_opens_on_a_packed_one(source, packed, tmp_path, algorithm):
    save_lora(shaken(add_lora(load(source), r=4, alpha=8)), tmp_path / "adapter", tmp_path / "base")
    ours = open_lora(load(packed / algorithm), tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(dequantized(load(packed / algorithm)), tmp_path / "adapter")
    assert (ours(TOKENS).logits - plain(TOKENS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_has_targets(family, tmp_path):
    model = families.build(family)
    adapted = shaken(add_lora(model, r=2, alpha=4))
    tokens = torch.arange(3, 12)[None]
    with adapted.disable_adapter():
        base = adapted(tokens).logits
    assert (adapted(tokens).logits - base).abs().max() > 0
    save_lora(adapted, tmp_path / "adapter", tmp_path / "base")
    assert any("lora_B" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_experts_and_routers_are_left_alone():
    assert find_targets(families.build("mixtral")) == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_an_embedding_on_codes_is_no_target(source, tmp_path):
    quantize.run(QuantizeOptions(str(source), tmp_path / "q", "rtn", quantize_embeddings=True))
    assert find_targets(load(tmp_path / "q")) == find_targets(load(source))


def test_a_seed_decides_where_adapters_start(source):
    state = torch.get_rng_state()
    a, b, c = (
        {n: p for n, p in add_lora(load(source), r=2, alpha=4, seed=seed).named_parameters() if "lora_A" in n}
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in a)
    assert torch.equal(torch.get_rng_state(), state)


def test_codes_take_up_no_adapter(packed):
    with pytest.raises(UsageError, match="cannot be merged into quantized weights"):
        add_lora(load(packed / "nf4"), r=2, alpha=4).merge_and_unload()


def test_unknown_target(source):
    with pytest.raises(UsageError, match="'qproj': no linear in a block has that name, did you mean 'q_proj'"):
        add_lora(load(source), r=2, alpha=4, target_modules=["qproj"])


def test_an_adapter_of_another_model_or_damaged(source, tmp_path):
    folder = tmp_path / "adapter"
    save_lora(add_lora(load(source), r=2, alpha=4), folder, source)
    wide = tiny.checkpoint(tmp_path / "wide", hidden_size=128)
    with pytest.raises(InputError, match="does not fit the model or is damaged"):
        open_lora(load(wide), folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="does not fit the model or is damaged"):
        open_lora(load(source), folder)
    file.unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        open_lora(load(source), folder)
