"""Checkpoints of small floats as sources: quantized from them is quantized from what they stand for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

import tiny
from quantcli.errors import InputError
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.dequantized import as_float, float_kind
from quantcli.models.load import load
from quantcli.options import QuantizeOptions
from quantcli.pipelines import inspect, quantize
from quantcli.scheme import PER_CHANNEL, Scheme
from quantcli.tensors.grids import round_nearest

IDS = torch.arange(3, 40)[None]


def logits(folder):
    with torch.no_grad():
        return load(folder, device="cpu")(IDS).logits


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("source") / "float", hidden_size=128, intermediate_size=256)


def as_fp8(source, folder, blocks):
    """As DeepSeek stores it: blocks of 128 x 128 with `weight_scale_inv`; or one scale per matrix (vLLM)."""
    shutil.copytree(source, folder)
    expected = {}

    def change(tensors):
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            scheme = Scheme(8, 128 if blocks else PER_CHANNEL, codebook="e4m3", block_rows=128 if blocks else 1)
            found = round_nearest(tensors[name].float(), scheme)
            scale = found.scale[::128] if blocks else found.scale
            tensors[name] = found.codes.view(torch.float8_e4m3fn)
            tensors[f"{name}_scale{'_inv' if blocks else ''}"] = scale.contiguous()
            expected[name] = found.dequantize()

    tiny.edit_weights(folder, change)
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    tiny.edit_json(
        folder / "config.json", quantization_config=config | ({"weight_block_size": [128, 128]} if blocks else {})
    )
    return expected


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "rows"])
def test_fp8_is_read_run_and_quantized(source, tmp_path, blocks):
    expected = as_fp8(source, tmp_path / "fp8", blocks)
    view = as_float(Checkpoint.open(tmp_path / "fp8"))
    for name, weight in expected.items():
        assert torch.equal(view.read(name), weight.to(view.entries[name].dtype))
    assert "quantization_config" not in view.config
    error = (logits(tmp_path / "fp8") - logits(source)).norm() / logits(source).norm()
    assert 0 < error < 0.15
    assert inspect.run(tmp_path / "fp8").format == "safetensors, fp8"

    def change(tensors):
        for name, weight in expected.items():
            tensors[name] = weight.to(tensors[name].dtype)

    shutil.copytree(source, tmp_path / "plain")
    tiny.edit_weights(tmp_path / "plain", change)
    for name in ("fp8", "plain"):
        quantize.run(QuantizeOptions(str(tmp_path / name), tmp_path / f"{name}4", algorithm="rtn", device="cpu"))
    codes = [load_file(tmp_path / f"{name}4" / "model" / "model.safetensors") for name in ("fp8", "plain")]
    assert codes[0].keys() == codes[1].keys()
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


@pytest.mark.parametrize(
    "options",
    [
        {"format": "float-quantized", "group_size": 128},
        {"format": "nvfp4-pack-quantized", "activations": "float"},
        {"format": "mxfp4-pack-quantized"},
    ],
    ids=lambda o: o["format"],
)
def test_what_we_write_in_small_floats_is_a_source(source, tmp_path, options):
    first = tmp_path / "first"
    quantize.run(QuantizeOptions(str(source), first, algorithm="rtn", device="cpu", **options))
    assert float_kind(Checkpoint.open(first / "model").config) == options["format"]
    result = quantize.run(QuantizeOptions(str(first), tmp_path / "second", algorithm="rtn", bits=8, device="cpu"))
    assert result.plan["scheme"]["codebook"] is None
    weights = load(first, device="cpu").get_submodule("model.layers.1.mlp.up_proj").dequantize()
    again = load(tmp_path / "second", device="cpu").get_submodule("model.layers.1.mlp.up_proj").dequantize()
    assert float((weights - again).norm() / weights.norm()) < 0.01


def test_integers_are_no_source(source, tmp_path):
    quantize.run(QuantizeOptions(str(source), tmp_path / "q", algorithm="rtn", device="cpu", format="int-quantized"))
    with pytest.raises(InputError, match=r"already quantized \(compressed-tensors\)") as caught:
        quantize.run(QuantizeOptions(str(tmp_path / "q"), tmp_path / "r", algorithm="rtn", device="cpu"))
    assert "FP8, NVFP4 and MXFP4 are dequantized" in caught.value.hint


@pytest.fixture
def gpt_oss(tmp_path):
    """The same model float and with its experts in MXFP4, whose values bfloat16 holds."""
    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=96, sliding_window=16,
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    packed = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = parameter.detach().contiguous()
            continue
        weight = torch.randn(parameter.shape).mT.contiguous()  # [E, N, K]
        rows = weight.flatten(0, 1)
        found = round_nearest(rows, Scheme(4, 32, codebook="e2m1", scale="e8m0"))
        experts, count = weight.shape[:2]
        pairs = found.codes.view(experts, count, -1, 16, 2)
        packed[f"{name}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).contiguous()
        packed[f"{name}_scales"] = (found.scale.log2() + 127).to(torch.uint8).view(experts, count, -1)
        parameter.data.copy_(found.dequantize().view(weight.shape).mT)
    model.save_pretrained(tmp_path / "float")
    tiny.save_tokenizer(tmp_path / "float")
    shutil.copytree(tmp_path / "float", tmp_path / "mxfp4", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(packed, tmp_path / "mxfp4" / "model.safetensors")
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    tiny.edit_json(tmp_path / "mxfp4" / "config.json", quantization_config=config)
    return tmp_path


def test_gpt_oss_layout(gpt_oss):
    assert torch.allclose(logits(gpt_oss / "mxfp4"), logits(gpt_oss / "float"), atol=1e-5)
    options = {"algorithm": "rtn", "group_size": 32, "readers": ("quantcli",), "dtype": "float32", "device": "cpu"}
    for name in ("mxfp4", "float"):
        quantize.run(QuantizeOptions(str(gpt_oss / name), gpt_oss / f"{name}4", **options))
    assert torch.allclose(logits(gpt_oss / "mxfp44"), logits(gpt_oss / "float4"), atol=1e-4)
    tensors = load_file(gpt_oss / "mxfp4" / "model.safetensors")
    name = next(n for n in tensors if n.endswith("_scales"))
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, gpt_oss / "mxfp4" / "model.safetensors")
    with pytest.raises(InputError, match="has no scales that fit it"):
        load(gpt_oss / "mxfp4", device="cpu")


def test_other_fp8_is_refused_by_name(source, tmp_path):
    as_fp8(source, tmp_path / "fp8", blocks=True)
    path = tmp_path / "fp8" / "config.json"
    config = json.loads(path.read_text())["quantization_config"]
    for change, why in (
        ({"fmt": "e5m2"}, "e5m2: e4m3 is read"),
        ({"activation_scheme": "x"}, "'x': dynamic and static"),
    ):
        tiny.edit_json(path, quantization_config=config | change)
        with pytest.raises(InputError, match=why):
            load(tmp_path / "fp8", device="cpu")
