"""Formats that fix a grid and round activations: what they decide, what they refuse, what becomes of it."""

import json

import pytest
import torch

import small_graphs
import tiny
from quantcli.errors import InputError, UsageError
from quantcli.models.load import load
from quantcli.options import CalibrationOptions, CaptureOptions, Override, QuantizeOptions, SimulationOptions
from quantcli.pipelines import capture, inspect, quantize
from quantcli.pipelines.planning.layout import resolve_layout
from quantcli.tensors.activations import InputRounding

TEXT = CalibrationOptions(data="builtin", num_samples=4, seq_len=64)
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("layouts") / "float", hidden_size=128, intermediate_size=256)


def written(source, folder, **options):
    quantize.run(QuantizeOptions(str(source), folder, **{"algorithm": "rtn", "device": "cpu"} | options))
    return json.loads((folder / "model" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("options", "why", "hint"),
    [
        ({"bits": 4}, "has 8 bits, not 4", "leave --bits out"),
        ({"symmetric": False}, "has no zero points", "leave --asym out"),
        ({"group_size": 64}, "groups of -1, not 64", "leave it out"),
        ({"target_bits": 4.0}, "there is nothing to mix", "another --format"),
        ({"activations": "float"}, "dynamic or static activations, not float", "--format compressed-tensors --bits 8"),
        ({"overrides": (Override("q_proj", bits=4),)}, "--override 'q_proj' would change it", "--exclude"),
        (
            {"format": "float-quantized", "group_size": 128, "activations": "static"},
            "have dynamic activations",
            "leave",
        ),
        ({"format": "nvfp4-pack-quantized", "activations": "static"}, "dynamic or float activations", "use dynamic"),
        ({"format": "gptq", "activations": "dynamic"}, "for layouts that round them: int-quantized", "int-quantized"),
        ({"format": "gptq", "kv_cache": "fp8"}, "stored by the layouts of compressed-tensors", "compressed-tensors"),
        ({"format": None, "kv_cache": "fp8"}, "stored by the layouts of compressed-tensors", "compressed-tensors"),
    ],
)
def test_what_a_layout_does_not_have_is_refused(source, tmp_path, options, why, hint):
    with pytest.raises(UsageError) as caught:
        written(source, tmp_path / "q", **{"format": "int-quantized"} | options)
    assert why in caught.value.message
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "q").exists()


def test_graphs_have_flags_of_their_own(tmp_path):
    small_graphs.mlp(tmp_path / "m.onnx")
    for option in ({"activations": "dynamic"}, {"kv_cache": "fp8"}):
        with pytest.raises(UsageError, match="is for checkpoints, this is an ONNX graph"):
            quantize.run(QuantizeOptions(str(tmp_path / "m.onnx"), tmp_path / "q", algorithm="rtn", **option))


def test_unknown_words_name_the_nearest(source, tmp_path):
    for name, value in (("activations", "dynamical"), ("kv_cache", "fp9")):
        with pytest.raises(UsageError, match="unknown --"):
            QuantizeOptions(str(source), tmp_path / "q", **{name: value})


def test_rounders_that_do_not_make_it_are_refused(source, tmp_path):
    for algorithm, options in (("hqq", {}), ("nf4", {})):
        with pytest.raises(UsageError, match=f"cannot hold what {algorithm} makes"):
            written(source, tmp_path / "q", algorithm=algorithm, format="mxfp4-pack-quantized", **options)
    blocks = {"format": "float-quantized", "group_size": 128, "calibration": TEXT}
    with pytest.raises(UsageError, match="refit fits the scales of single rows") as caught:
        written(source, tmp_path / "q", algorithm="gptq", settings={"refit": "true"}, **blocks)
    assert "refit=false" in caught.value.hint


def test_integers_are_smoothed_unless_something_else_is_named(source, tmp_path):
    def chosen(**options):
        return resolve_layout(QuantizeOptions(str(source), tmp_path, format="int-quantized", **options)).algorithm

    assert chosen() == chosen(preset="best") == "smoothquant,gptq"
    assert chosen(preset="fast") is None
    assert chosen(algorithm="rtn") == "rtn"
    result = quantize.run(
        QuantizeOptions(str(source), tmp_path / "q", format="int-quantized", calibration=TEXT, device="cpu")
    )
    assert set(result.plan["transforms"]) == {"smoothquant"}
    assert result.plan["algorithm"] == "gptq"
    assert any(scale.alpha is not None for scale in result.scales)


def test_static_scales_are_the_largest_that_calibration_saw(source, tmp_path):
    """Without data nothing could be stored: rtn reads text here, and each linear knows its own input."""
    written(source, tmp_path / "q", format="float-quantized", activations="static", calibration=TEXT)
    model = load(tmp_path / "q", device="cpu")
    scales = {
        name: module.rounding.stored
        for name, module in model.named_modules()
        if isinstance(getattr(module, "rounding", None), InputRounding)
    }
    assert len(scales) == 14
    block = "model.layers.0.self_attn"
    assert scales[f"{block}.q_proj"] == scales[f"{block}.k_proj"] != scales[f"{block}.o_proj"]
    from quantcli.pipelines.blockwise.tokens import saved_tokens  # the same text, through the embedding and the norm
    from quantcli.pipelines.planning.decide import make_plan
    from quantcli.progress import Silent

    options = QuantizeOptions(
        str(source), tmp_path / "r", algorithm="rtn", format="float-quantized", activations="static",
        calibration=TEXT, device="cpu",
    )  # fmt: skip
    (tmp_path / "state").mkdir()
    tokens = saved_tokens(make_plan(options), tmp_path / "state", Silent())["rows"]
    plain = load(source, device="cpu")
    with torch.no_grad():
        seen = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(tokens)).abs().max()
    assert torch.allclose(scales[f"{block}.q_proj"] * 448, seen, rtol=2**-8)


def test_calibration_flags_without_use_are_refused(source, tmp_path):
    with pytest.raises(UsageError, match="uses no calibration text"):
        written(source, tmp_path / "q", format="float-quantized", calibration=TEXT)


@pytest.mark.parametrize("format", ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "float-quantized"])
def test_scales_that_cannot_be_divided_are_left(source, tmp_path, format):
    """Scaling goes into norms; into codes only where their scales take any factor."""
    size = {"group_size": 128} if format == "float-quantized" else {}
    options = {"algorithm": "awq,gptq", "format": format, "calibration": TEXT} | size
    written(source, tmp_path / "q", **options)
    report = json.loads((tmp_path / "q" / "report.json").read_text())
    scaled = {layer["kind"]: layer["scaled"] for layer in report["layers"]}
    assert scaled["q_proj"]
    assert not scaled["o_proj"]
    assert not scaled["down_proj"]


def test_linears_that_run_as_one_share_what_divides_their_scales(source, tmp_path):
    written(source, tmp_path / "q", format="nvfp4-pack-quantized", activations="float")
    model = load(tmp_path / "q", device="cpu")

    def divisor(name):
        return model.get_submodule(f"model.layers.0.{name}").quantized().divisor

    attention = [divisor(f"self_attn.{name}_proj") for name in "qkv"]
    assert attention[0] == attention[1] == attention[2] != divisor("self_attn.o_proj")
    assert divisor("mlp.gate_proj") == divisor("mlp.up_proj")


def test_fp8_cache(source, tmp_path):
    config = written(source, tmp_path / "q", format="float-quantized", kv_cache="fp8", calibration=TEXT)
    assert config["kv_cache_scheme"]["type"] == "float"
    assert not config["kv_cache_scheme"]["dynamic"]
    plain = written(source, tmp_path / "p", format="float-quantized")
    assert plain["kv_cache_scheme"] is None
    with torch.no_grad():
        one, other = (load(tmp_path / name, device="cpu")(IDS).logits for name in "qp")
    assert 0 < float((one - other).norm() / other.norm()) < 0.1
    model = load(tmp_path / "q", device="cpu")
    with torch.no_grad():  # a cache that holds rounded values is read as it is
        whole = model(IDS).logits[:, -1]
        past = model(IDS[:, :-1], use_cache=True).past_key_values
        assert torch.allclose(model(IDS[:, -1:], past_key_values=past).logits[:, -1], whole, atol=1e-5)


def test_nothing_is_rounded_twice_nor_captured(source, tmp_path):
    written(source, tmp_path / "q", format="int-quantized", kv_cache="fp8", calibration=TEXT)
    for options in (SimulationOptions(a_bits=8), SimulationOptions(k_bits=8)):
        with pytest.raises(UsageError, match="by itself"):
            load(tmp_path / "q", device="cpu", simulation=options)
    with pytest.raises(InputError, match=r"no exact form in MatMulNBits.*its activations are rounded"):
        capture.run(CaptureOptions(str(tmp_path / "q"), tmp_path / "graph"))


@pytest.mark.parametrize(
    ("options", "bits", "words"),
    [
        ({"format": "int-quantized"}, 8.1, "int-quantized"),
        ({"format": "float-quantized", "group_size": 128}, 8.0, "float-quantized"),
        ({"format": "nvfp4-pack-quantized", "activations": "float"}, 4.5, "nvfp4-pack-quantized"),
        ({"format": "mxfp4-pack-quantized"}, 4.25, "mxfp4-pack-quantized"),
    ],
    ids=lambda x: x.get("format") if isinstance(x, dict) else "",
)
def test_inspect_says_what_it_is(source, tmp_path, options, bits, words):
    written(source, tmp_path / "q", **options)
    found = inspect.run(tmp_path / "q")
    assert words in found.format
    assert found.quantized_bits_per_weight == pytest.approx(bits, abs=0.1)
    assert found.parameters == inspect.run(source).parameters
    assert found.opens["quantcli"] is None
    assert found.opens["transformers"] is None
    assert found.opens["gptqmodel"] is not None
