"""nf4 and fp4 through the commands: the format that an algorithm brings along, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
from quantcli.errors import InputError, UsageError
from quantcli.models.codebook_linear import CodebookLinear
from quantcli.models.load import load
from quantcli.options import CalibrationOptions, CaptureOptions, EvaluateOptions, Override, QuantizeOptions
from quantcli.pipelines import capture, evaluate, inspect, quantize
from quantcli.scheme import Scheme
from quantcli.tensors.codebook import round_to_codebook

TOKENS = torch.tensor([[3, 50, 7, 99, 12, 0, 45]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("codebook") / "f")


def run(source, output, algorithm="nf4", **more):
    return quantize.run(
        QuantizeOptions(str(source), output, **({"algorithm": algorithm, "group_size": 32, "device": "cpu"} | more))
    )


def stored(output):
    return {n: t for p in (output / "model").glob("*.safetensors") for n, t in load_file(p).items()}


@pytest.mark.parametrize("algorithm", ["nf4", "fp4"])
@pytest.mark.parametrize("double", ["false", "true"])
def test_what_is_written_is_the_rounded_matrix(source, tmp_path, algorithm, double):
    result = run(source, tmp_path / "q", algorithm, settings={"double_quant": double})
    bits = Scheme(4, 32, codebook=algorithm, double_quant=double == "true").bits_per_weight(96)
    assert result.bits_per_weight == pytest.approx(bits)
    weight = load_file(source / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    expected = round_to_codebook(weight, Scheme(4, 32, codebook=algorithm, double_quant=double == "true"))
    layer = load(tmp_path / "q", device="cpu").model.layers[1].mlp.down_proj
    assert isinstance(layer, CodebookLinear)
    assert torch.equal(layer.dequantize(), expected.dequantize())
    manifest = json.loads((tmp_path / "q" / "quantcli.json").read_text())
    assert manifest["options"]["format"] == "bnb"
    found = inspect.run(tmp_path / "q")
    assert found.what == "BITSANDBYTES checkpoint" and f"bitsandbytes ({algorithm})" in found.format
    assert found.histogram[0].label == "4-bit" and found.intact


def test_float_holds_it_too(source, tmp_path):
    run(source, tmp_path / "q", dtype="keep")
    run(source, tmp_path / "d", format="float")
    ours, dense = load(tmp_path / "q", device="cpu"), load(tmp_path / "d", device="cpu")
    for name, module in ours.named_modules():
        if isinstance(module, CodebookLinear):
            assert torch.equal(module.dequantize(), dense.get_submodule(name).weight)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-5)
    # any group size where nothing is packed
    run(source, tmp_path / "any", format="float", group_size=48)


@pytest.mark.parametrize("double", ["false", "true"])
def test_after_a_transform(source, tmp_path, double):
    (tmp_path / "text.txt").write_text(tiny.words(600))
    text = CalibrationOptions(str(tmp_path / "text.txt"), num_samples=4, seq_len=32)
    run(source, tmp_path / "q", "awq,nf4", calibration=text, settings={"double_quant": double})
    result = evaluate.run(
        EvaluateOptions(str(tmp_path / "q"), str(source), num_samples=2, seq_len=32, speed=False, device="cpu")
    )
    assert result.kl_mean < 0.05


def test_it_cannot_be_quantized_again_or_captured(source, tmp_path):
    run(source, tmp_path / "q")
    with pytest.raises(InputError, match="already quantized"):
        run(tmp_path / "q", tmp_path / "again")
    with pytest.raises(InputError, match="evenly spaced levels") as caught:
        capture.run(CaptureOptions(str(tmp_path / "q"), tmp_path / "o"))
    assert "--format float" in caught.value.hint and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"format": "gptq"}, "format gptq cannot hold what nf4 makes: bnb, float can", "use --format bnb"),
        ({"algorithm": "rtn", "format": "bnb"}, "cannot hold what rtn makes", "-a fp4 or nf4"),
        ({"algorithm": None, "format": "bnb"}, "cannot hold what gptq makes", "-a fp4 or nf4"),
        ({"symmetric": True}, "nf4 has no zero points", "leave it out"),
        ({"symmetric": False}, "nf4 has no zero points", "leave it out"),
        ({"overrides": (Override("q_proj", symmetric=False),)}, "nf4 has no zero points", "leave it out"),
        ({"bits": 3}, "nf4 makes 4 bits, not 3", "algorithms"),
        (
            {"overrides": (Override("q_proj", bits=8),)},
            "codebooks are nf4 of 4, fp4 of 4, int8 of 8, e2m1 of 4, e4m3 of 8 bits, got nf4, 8 bits",
            None,
        ),
        ({"group_size": 64}, "down_proj: blocks of 64 do not divide 96 inputs", "--format float"),
        ({"group_size": 48}, "q_proj: blocks of 48 are not a power of two", "--format float"),
        ({"group_size": -1}, "blocks of 96", "--format float"),
        ({"quantize_embeddings": True}, "bnb has no quantized embedding", "leave --quantize-embeddings out"),
        ({"calibration": CalibrationOptions("builtin")}, "nf4 uses no calibration text", None),
        ({"preset": "best"}, "preset best is a setting of gptq", None),
    ],
)
def test_what_is_refused(source, tmp_path, values, message, hint):
    with pytest.raises(UsageError) as caught:
        run(source, tmp_path / "q", **values)
    assert message in caught.value.message
    assert hint is None or hint in caught.value.hint
    assert not (tmp_path / "q").exists()


def test_experts_stay_float(tmp_path):
    source = tiny.checkpoint(tmp_path / "f", "mixtral", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(UsageError, match="its readers keep experts float"):
        run(source, tmp_path / "q")
    run(source, tmp_path / "q", exclude=(r"\.experts\.",))
    config = json.loads((tmp_path / "q" / "model" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["llm_int8_skip_modules"]
    with torch.no_grad():
        assert torch.isfinite(load(tmp_path / "q", device="cpu")(TOKENS).logits).all()


def test_other_blocks_for_some_linears(source, tmp_path):
    run(source, tmp_path / "q", overrides=(Override("q_proj", group_size=64),))
    tensors = stored(tmp_path / "q")
    assert tensors["model.layers.0.self_attn.q_proj.weight.absmax"].numel() == 64
    assert tensors["model.layers.0.self_attn.o_proj.weight.absmax"].numel() == 64 * 2
    load(tmp_path / "q", device="cpu")
