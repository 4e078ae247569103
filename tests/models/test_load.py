"""Loading: every format gives the logits of the dequantized model, and every damage its own line."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quantcli.errors import InputError, UsageError
from quantcli.formats import gptq
from quantcli.formats.bitpack import pack_rows
from quantcli.formats.codec import Described
from quantcli.models.linear import PackedEmbedding, PackedLinear
from quantcli.models.load import load
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

TOKENS = torch.tensor([[3, 50, 7, 99, 12, 0, 45]])
SMALL = {
    "vocab_size": 104,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def tiny_model(model_type: str = "llama", **settings):
    torch.manual_seed(0)
    values = SMALL | {"intermediate_size": 96, "num_key_value_heads": 2}
    if model_type == "gpt2":
        values = {"vocab_size": 104, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    elif model_type == "gemma3_text":
        values |= {"head_dim": 16}
    elif model_type == "qwen2":
        values |= {"tie_word_embeddings": True}
    config = AutoConfig.for_model(model_type, **(values | settings))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms that matter
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def rounded(weight: torch.Tensor, scheme: Scheme, shuffled: bool = False) -> QuantizedTensor:
    """Plain rounding of [N, K], groups shuffled on request; written here so that no rounder of ours is needed."""
    n, k = weight.shape
    group = group_index(k, scheme)
    if shuffled:
        group = group[torch.randperm(k, generator=torch.Generator().manual_seed(1))]
    scale = torch.empty(n, scheme.group_count(k))
    zero = torch.empty_like(scale)
    for g in range(scheme.group_count(k)):
        part = weight[:, group == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale[:, g] = ((high - low) / (scheme.levels - 1)).clamp(min=1e-6)
        zero[:, g] = (-low / scale[:, g]).round().clamp(scheme.lowest_zero, scheme.levels - 1)
    scale = scale.half()
    index = group.long()
    codes = (weight / scale.float()[:, index] + zero[:, index]).round().clamp(0, scheme.levels - 1)
    return QuantizedTensor(codes.to(torch.uint8), scale, zero.to(torch.uint8), scheme, group)


def quantize_linears(model, scheme: Scheme, shuffled: bool = False) -> dict[str, QuantizedTensor]:
    """Replaces the weights of all linears in blocks by their rounded values; returns what they were rounded to."""
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            found[name] = rounded(weight.float().contiguous(), scheme, shuffled)
            value = found[name].dequantize()
            module.weight.data = value.T.contiguous() if isinstance(module, Conv1D) else value
    return found


def save_packed(model, packed: dict[str, dict[str, torch.Tensor]], config: dict, folder: Path) -> Path:
    """Writes the model with some modules' weights replaced by packed tensors."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, parts in packed.items():
        tensors.pop(f"{name}.weight", None)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    return folder


def gptq_folder(folder: Path, model, scheme: Scheme, shuffled: bool = False) -> Path:
    packed = {n: gptq.pack(q) for n, q in quantize_linears(model, scheme, shuffled).items()}
    config = gptq.config_for(Described(scheme, {}, [], desc_act=shuffled, head=None, producer="test"))
    return save_packed(model, packed, config, folder)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "gemma3_text"])
def test_gptq_gives_the_logits_of_the_dequantized_model(tmp_path, model_type):
    model = tiny_model(model_type)
    folder = gptq_folder(tmp_path / "q", model, Scheme(4, 32, lowest_zero=1))
    loaded = load(folder, device="cpu")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert not loaded.training
    assert sum(isinstance(m, PackedLinear) for m in loaded.modules()) == len(
        [n for n in load_file(folder / "model.safetensors") if n.endswith(".qweight")]
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_bits_and_desc_act(tmp_path, bits, shuffled):
    model = tiny_model()
    folder = gptq_folder(tmp_path / "q", model, Scheme(bits, 48, lowest_zero=1), shuffled)
    torch.testing.assert_close(logits(load(folder, device="cpu")), logits(model), rtol=1e-4, atol=1e-4)


FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "gpt_neox": {},
    "phi3": {"pad_token_id": 0},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2": {"head_dim": 16},
    "qwen3": {"head_dim": 16},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_by_the_names_on_disk(tmp_path, model_type):
    """Packs what the files hold, experts one by one, and compares with transformers on the rounded weights."""
    tiny_model(model_type, **FAMILIES[model_type]).save_pretrained(tmp_path / "f")
    tensors = load_file(tmp_path / "f" / "model.safetensors")
    scheme = Scheme(4, 32, lowest_zero=1)
    packed = {}
    for name in [n for n in tensors if _is_block_linear(n, tensors[n])]:
        q = rounded(tensors[name].float(), scheme)
        tensors[name] = q.dequantize()
        packed[name.removesuffix(".weight")] = gptq.pack(q)
    assert len(packed) >= 2 * 4
    save_file(tensors, tmp_path / "f" / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "f").eval()
    config = gptq.config_for(Described(scheme, {}, [], desc_act=False, head=None, producer="test"))
    shutil.copytree(tmp_path / "f", tmp_path / "q")
    for name, parts in packed.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    loaded = load(tmp_path / "q", device="cpu")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-4)


def _is_block_linear(name: str, tensor: torch.Tensor) -> bool:
    inside = ".layers." in name or ".h." in name
    router = name.endswith("gate.weight")
    return inside and name.endswith(".weight") and tensor.ndim == 2 and not router


def test_float_folder(tmp_path):
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path / "f")
    torch.testing.assert_close(logits(load(tmp_path / "f", device="cpu")), logits(model))
    assert load(tmp_path / "f", device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_gptq_v2_holds_zero_points_of_zero(tmp_path):
    model = tiny_model()
    quantized = quantize_linears(model, Scheme(4, 32))
    packed = {
        n: {
            "qweight": pack_rows(q.codes.T, 4),
            "qzeros": pack_rows(q.zero, 4).T.contiguous(),
            "scales": q.scale.T.contiguous(),
            "g_idx": q.group,
        }
        for n, q in quantized.items()
    }
    config = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 32}
    folder = save_packed(model, packed, config, tmp_path / "q")
    torch.testing.assert_close(logits(load(folder, device="cpu")), logits(model), rtol=1e-4, atol=1e-4)


def test_dynamic_overrides_and_float_linears(tmp_path):
    model = tiny_model()
    keep = "model.layers.1.mlp.down_proj"
    original = copy.deepcopy(model.get_submodule(keep).weight.data)
    quantized = quantize_linears(model, Scheme(4, 32, lowest_zero=1))
    del quantized[keep]
    model.get_submodule(keep).weight.data = original
    other = "model.layers.0.self_attn.q_proj"
    scheme = Scheme(8, 16, lowest_zero=1)
    quantized[other] = rounded(model.get_submodule(other).weight.data, scheme)
    model.get_submodule(other).weight.data = quantized[other].dequantize()
    config = gptq.config_for(
        Described(Scheme(4, 32), {other: scheme}, [keep], desc_act=False, head=None, producer="test")
    )
    folder = save_packed(model, {n: gptq.pack(q) for n, q in quantized.items()}, config, tmp_path / "q")
    loaded = load(folder, device="cpu")
    assert loaded.get_submodule(other).bits == 8
    assert isinstance(loaded.get_submodule(keep), torch.nn.Linear)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_awq(tmp_path):
    model = tiny_model()
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # as AutoAWQ documents it

    def words(values):  # [R, N] to [R, N / 8]
        out = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
        for place, output in enumerate(order):
            out |= values[:, output::8].long() << (4 * place)
        return torch.where(out >= 1 << 31, out - (1 << 32), out).int()

    packed = {
        n: {"qweight": words(q.codes.T), "qzeros": words(q.zero.T), "scales": q.scale.T.contiguous()}
        for n, q in quantize_linears(model, Scheme(4, 32)).items()
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    folder = save_packed(model, packed, config, tmp_path / "q")
    torch.testing.assert_close(logits(load(folder, device="cpu")), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_quantized_embedding_and_head(tmp_path, model_type):
    model = tiny_model(model_type, tie_word_embeddings=False)
    scheme, eight = Scheme(4, 32, lowest_zero=1), Scheme(8, 16, lowest_zero=1)
    quantized = quantize_linears(model, scheme)
    for name in ("lm_head", "model.embed_tokens"):
        quantized[name] = rounded(model.get_submodule(name).weight.data, eight)
        model.get_submodule(name).weight.data = quantized[name].dequantize()
    config = gptq.config_for(Described(scheme, {"lm_head": eight}, [], desc_act=False, head="lm_head", producer="test"))
    config["quantcli"] = {"embedding": {"name": "model.embed_tokens", "bits": 8, "group_size": 16, "sym": False}}
    folder = save_packed(model, {n: gptq.pack(q) for n, q in quantized.items()}, config, tmp_path / "q")
    loaded = load(folder, device="cpu")
    assert isinstance(loaded.get_input_embeddings(), PackedEmbedding)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_tied_head_of_a_quantized_embedding_shares_its_codes(tmp_path):
    model = tiny_model("qwen2")
    eight = Scheme(8, 16, lowest_zero=1)
    q = rounded(model.get_input_embeddings().weight.data, eight)
    model.get_input_embeddings().weight.data = q.dequantize()
    packed = {n: gptq.pack(t) for n, t in quantize_linears(model, Scheme(4, 32, lowest_zero=1)).items()}
    config = gptq.config_for(Described(Scheme(4, 32), {}, [], desc_act=False, head=None, producer="test"))
    config["quantcli"] = {"embedding": {"name": "model.embed_tokens", "bits": 8, "group_size": 16, "sym": False}}
    folder = save_packed(model, packed | {"model.embed_tokens": gptq.pack(q)}, config, tmp_path / "q")
    loaded = load(folder, device="cpu")
    assert loaded.get_output_embeddings() is loaded.get_input_embeddings().packed
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_tied_head_with_codes_of_its_own(tmp_path):
    model = tiny_model("qwen2")
    quantized = quantize_linears(model, Scheme(4, 32, lowest_zero=1))
    quantized["lm_head"] = rounded(model.get_output_embeddings().weight.data, Scheme(4, 32, lowest_zero=1))
    embedding = model.get_input_embeddings().weight.data.clone()
    config = gptq.config_for(Described(Scheme(4, 32), {}, [], desc_act=False, head="lm_head", producer="test"))
    folder = save_packed(model, {n: gptq.pack(q) for n, q in quantized.items()}, config, tmp_path / "q")
    loaded = load(folder, device="cpu")
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    model.lm_head.weight = torch.nn.Parameter(quantized["lm_head"].dequantize())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_output_folder_generation_and_cache(tmp_path):
    model = tiny_model()
    model.generation_config.repetition_penalty = 1.25
    gptq_folder(tmp_path / "q" / "model", model, Scheme(4, 32, lowest_zero=1))
    (tmp_path / "q" / "quantcli.json").write_text("{}")
    loaded = load(tmp_path / "q", device="cpu")
    assert loaded.generation_config.repetition_penalty == 1.25
    new = loaded.generate(TOKENS, max_new_tokens=5, do_sample=False)
    assert new.shape == (1, TOKENS.shape[1] + 5)
    cached = load(tmp_path / "q", device="cpu", cache_weights=True)
    torch.testing.assert_close(logits(cached), logits(loaded), rtol=1e-5, atol=1e-5)


def _config(folder: Path, **values) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))


def _tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _config(f, quant_method="hqq"), "quant_method 'hqq'"),
        (lambda f: _config(f, checkpoint_format="marlin"), "layout 'marlin'"),
        (lambda f: _config(f, bits=8), "qweight has shape"),
        (lambda f: _config(f, group_size=16), "qzeros has shape"),
        (lambda f: _config(f, bits=9), "bits must be 2 to 8"),
        (lambda f: _tensors(f, lambda t: t.pop(f"{Q}.scales")), f"linear {Q}: scales is missing"),
        (lambda f: _tensors(f, lambda t: t[f"{Q}.g_idx"].add_(5)), "g_idx names groups 5"),
        (lambda f: _tensors(f, lambda t: t[f"{Q}.scales"].fill_(float("nan"))), "NaN or infinite"),
        (lambda f: _tensors(f, lambda t: t.pop("model.norm.weight")), "lacks tensor model.norm.weight"),
        (lambda f: _tensors(f, lambda t: t.update(extra=torch.zeros(2))), "unexpected tensor extra"),
        (lambda f: _tensors(f, lambda t: t.update({f"{Q}.bias": torch.zeros(64)})), f"unexpected tensor {Q}.bias"),
        (lambda f: _tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(3)})), "has shape [3]"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    folder = gptq_folder(tmp_path / "q", tiny_model(), Scheme(4, 32, lowest_zero=1))
    damage(folder)
    with pytest.raises(InputError) as caught:
        load(folder, device="cpu")
    assert message in caught.value.message
    assert str(folder) in caught.value.message


def test_float_folder_without_a_tensor(tmp_path):
    tiny_model().save_pretrained(tmp_path / "f")
    _tensors(tmp_path / "f", lambda t: t.pop(f"{Q}.weight"))
    with pytest.raises(InputError, match=rf"lacks tensor {Q}\.weight"):
        load(tmp_path / "f", device="cpu")


def test_devices_and_dtypes_that_are_not(tmp_path):
    tiny_model().save_pretrained(tmp_path / "f")
    for device in ("tpu", "cuda:77", "mps"):
        with pytest.raises(UsageError, match=device):
            load(tmp_path / "f", device=device)
    with pytest.raises(UsageError, match="int8"):
        load(tmp_path / "f", device="cpu", dtype="int8")
