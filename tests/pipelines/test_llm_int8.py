"""LLM.int8() through the commands: codes, what the loaded model computes, outliers in the report, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import literal
import tiny
from quantcli.cli import app
from quantcli.errors import InputError, UsageError
from quantcli.models.int8_linear import Int8Linear
from quantcli.models.load import load
from quantcli.options import CalibrationOptions, EvaluateOptions, Override, QuantizeOptions
from quantcli.pipelines import evaluate, inspect, quantize

TOKENS = torch.tensor([[3, 50, 7, 99, 12, 0, 45]])
LOUD = 11
"""The channel that is made an outlier."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose first norm lets one channel be large, with weights that make up for it."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("int8") / "f")

    def shout(tensors):
        tensors["model.layers.0.input_layernorm.weight"][LOUD] *= 8
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"model.layers.0.self_attn.{name}.weight"][:, LOUD] /= 8

    tiny.edit_weights(folder, shout)
    (folder.parent / "text.txt").write_text(tiny.words(600))
    return folder


def run(source, output, algorithm="llm-int8", **more):
    text = CalibrationOptions(str(source.parent / "text.txt"), num_samples=4, seq_len=32)
    values = {"algorithm": algorithm, "device": "cpu", "dtype": "keep", "calibration": text} | more
    return quantize.run(QuantizeOptions(str(source), output, **values))


def test_what_is_written_is_the_literal_rounding_and_runs_as_the_literal_product(source, tmp_path):
    result = run(source, tmp_path / "q")
    stored = load_file(tmp_path / "q" / "model" / "model.safetensors")
    weight = load_file(source / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    codes, largest = literal.int8_rows(weight.numpy())
    name = "model.layers.0.self_attn.q_proj"
    assert (stored[f"{name}.weight"].numpy() == codes).all() and (stored[f"{name}.SCB"].numpy() == largest).all()
    assert stored[f"{name}.weight_format"].item() == 0
    model = load(tmp_path / "q", device="cpu")
    layer = model.get_submodule(name)
    assert isinstance(layer, Int8Linear) and layer.threshold == 6
    seen = []
    layer.register_forward_hook(lambda _module, given, got: seen.append((given[0], got)))
    with torch.no_grad():
        logits = model(TOKENS).logits
    x, got = seen[0][0][0], seen[0][1][0]
    assert x[:, LOUD].abs().max() > 6
    expected = torch.from_numpy(literal.int8_product(x.numpy(), codes, largest, 6.0)).float()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    float_logits = load(source, device="cpu")(TOKENS).logits
    assert (logits - float_logits).norm() / float_logits.norm() < 0.02
    assert result.bits_per_weight == pytest.approx(inspect.run(tmp_path / "q").quantized_bits_per_weight, rel=1e-3)


def test_the_report_finds_the_outlier(source, tmp_path, capsys):
    result = run(source, tmp_path / "q")
    kept = json.loads((tmp_path / "q" / "report.json").read_text())["outliers"]
    assert [o.linears[0] for o in result.outliers] == [o["linears"][0] for o in kept] and len(kept) == 8
    assert kept[0]["channels"] == [LOUD] and kept[0]["outlier_columns"] == 1 and kept[0]["tokens"] == 128
    assert 0 < kept[0]["most_frequent"] == kept[0]["touched"] <= 1 and kept[0]["largest"] > 6
    assert not any(o["outlier_columns"] for o in kept[1:])
    args = ["-m", str(source), "-o", str(tmp_path / "r"), "-a", "llm-int8", "--num-samples", "2", "--seq-len", "16"]
    assert app.run(["quantize", *args, "--data", str(source.parent / "text.txt")]) == 0
    shown = capsys.readouterr().out
    assert "input of" in shown and "model.layers.0.self_attn.q_proj and 2 more" in shown
    assert "outlier features (magnitude 6 or more)" in shown and "in 1 of 8 inputs" in shown


def test_the_threshold_decides(source, tmp_path):
    run(source, tmp_path / "q", settings={"threshold": "0"})
    run(source, tmp_path / "r")
    assert load(tmp_path / "q", device="cpu").model.layers[0].self_attn.q_proj.threshold == 0
    config = json.loads((tmp_path / "q" / "model" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_threshold"] == 0 and config["load_in_8bit"]
    kl = [
        evaluate.run(
            EvaluateOptions(str(tmp_path / n), str(source), num_samples=2, seq_len=32, speed=False, device="cpu")
        ).kl_mean
        for n in ("q", "r")
    ]
    assert kl[1] < 0.5 * kl[0]


def test_a_head_exclusions_transposed_linears_and_a_transform(source, tmp_path):
    run(source, tmp_path / "head", quantize_lm_head=True, exclude=("o_proj",))
    config = json.loads((tmp_path / "head" / "model" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == [f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)]
    gpt2 = tiny.checkpoint(tmp_path / "gpt2", "gpt2")
    (tmp_path / "text.txt").write_text(tiny.words(600))
    run(gpt2, tmp_path / "t")
    result = run(source, tmp_path / "s", "smoothquant,llm-int8")
    assert any(o.scaled for o in result.outliers) and result.scales
    for folder, original in (("head", source), ("t", gpt2), ("s", source)):
        ours, exact = (load(f, device="cpu")(TOKENS).logits for f in (tmp_path / folder, original))
        assert (ours - exact).norm() / exact.norm() < 0.02


def test_inspect_and_what_cannot_follow(source, tmp_path):
    run(source, tmp_path / "q")
    found = inspect.run(tmp_path / "q")
    assert "bitsandbytes (int8)" in found.format and found.intact and found.histogram[0].label == "8-bit"
    assert found.opens["transformers"] is None and "bnb-int8" in found.opens["vllm"]
    with pytest.raises(InputError, match="already quantized"):
        run(tmp_path / "q", tmp_path / "again")
    tiny.edit_json(
        tmp_path / "q" / "model" / "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": "6"},
    )
    with pytest.raises(InputError, match="llm_int8_threshold is '6'"):
        load(tmp_path / "q", device="cpu")


def test_gradients_reach_the_input(source, tmp_path):
    run(source, tmp_path / "q")
    layer = load(tmp_path / "q", device="cpu").model.layers[0].mlp.down_proj
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, -1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4}, "llm-int8 makes 8 bits, not 4"),
        ({"group_size": 64}, "llm-int8 makes groups of -1 alone, not 64"),
        ({"symmetric": True}, "llm-int8 has no zero points"),
        ({"overrides": (Override("q_proj", group_size=32),)}, "int8 has one scale per row"),
        ({"format": "gptq"}, "format gptq cannot hold what llm-int8 makes: bnb-int8, float can"),
        ({"format": "bnb"}, "format bnb cannot hold what llm-int8 makes"),
        ({"settings": {"threshold": "-1"}}, "threshold is a float16 number from 0 on"),
        ({"settings": {"threshold": "nan"}}, "threshold is a float16 number from 0 on"),
        ({"quantize_embeddings": True}, "bnb-int8 has no quantized embedding"),
        ({"readers": ("vllm",)}, "vllm does not read bnb-int8|vllm does not open this as bnb-int8"),
    ],
)
def test_what_is_refused(source, tmp_path, values, message):
    with pytest.raises(UsageError, match=message):
        run(source, tmp_path / "q", **values)
    assert not (tmp_path / "q").exists()
