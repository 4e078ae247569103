"""What `quantize` writes opens where it is said to: defaults, `--for`, and what a folder tells its readers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import quantcli
from quantcli.errors import UsageError
from quantcli.models.checkpoint import Checkpoint
from quantcli.options import Override, QuantizeOptions
from quantcli.pipelines import inspect, quantize
from quantcli.pipelines.planning.decide import make_plan

TOKENS = torch.arange(3, 40)[None]


def options(model, output="unused", **values):
    values.setdefault("algorithm", "rtn")
    return QuantizeOptions(str(model), Path(output), **values)


def written(model, output, **values):
    result = quantize.run(options(model, output, **values))
    return result, json.loads((output / "model/config.json").read_text())


def test_the_default_is_what_everybody_opens(models):
    plan = make_plan(QuantizeOptions(str(models("llama")), Path("unused"), group_size=32))
    assert (plan.algorithm.name, plan.options.format, plan.default.bits, plan.default.symmetric) == (
        "gptq",
        "gptq",
        4,
        1,
    )
    assert [plan.opens[name] for name in ("transformers", "gptqmodel", "vllm", "sglang", "quantcli")] == [None] * 5


@pytest.mark.parametrize(
    ("values", "format", "symmetric"),
    [
        ({"symmetric": False}, "awq", False),
        ({"symmetric": False, "bits": 3}, "gptq", False),
        ({"bits": 3}, "gptq", False),
        ({"bits": 8}, "gptq", True),
        ({"quantize_lm_head": True}, "compressed-tensors", True),
        ({"quantize_embeddings": True}, "gptq", True),
        ({"overrides": (Override("down_proj", bits=8),)}, "gptq", True),
        ({"algorithm": "nf4"}, "bnb", None),
        ({"algorithm": "gptq", "settings": {"order": "desc_act"}}, "gptq", True),
        ({"readers": ("vllm",), "bits": 3}, "compressed-tensors", False),
        ({"readers": ("vllm", "transformers"), "bits": 3}, "compressed-tensors", True),
        ({"readers": ("gptqmodel",), "quantize_lm_head": True}, "gptq", True),
        ({"readers": ("vllm",), "target_bits": 6.0}, "gptq", True),
        ({"format": "awq"}, "awq", False),
        ({"format": "float"}, "float", False),
    ],
)
def test_format_and_grid_follow_the_readers(models, values, format, symmetric):
    plan = make_plan(options(models("llama"), **{"group_size": 32, **values}))
    found = plan.options.symmetric if plan.algorithm.codebook is None else None
    assert (plan.options.format, found) == (format, symmetric)
    assert all(plan.opens[name] is None for name in plan.options.readers)


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"readers": ("vllm",), "format": "gptq", "bits": 3}, "vllm does not open this .*: it takes 4, 8", "--format"),
        ({"readers": ("vllm",), "format": "gptq", "symmetric": False}, "zero points", "--format awq"),
        ({"readers": ("vllm",), "algorithm": "nf4"}, "does not read bnb", "--format"),
        ({"readers": ("vllm",), "format": "float-quantized", "group_size": None}, "was not tried", "leave --for vllm"),
        ({"readers": ("vllm",), "group_size": 48}, "does not take groups of 48", "--group-size 32"),
        ({"readers": ("vllm",), "algorithm": "gptq", "settings": {"order": "desc_act"}}, "out of order", "--desc-act"),
        ({"readers": ("gptqmodel",), "format": "compressed-tensors"}, "does not read compressed-tensors", "gptq"),
        ({"readers": ("vllm",), "exclude": ("q_proj",)}, "q_proj, k_proj, v_proj .* as one", "alike"),
        ({"readers": ("peft",), "format": "gptq", "overrides": (Override("o_proj", bits=8),)}, "differ", "--override"),
        ({"format": "gptq", "quantize_lm_head": True}, "transformers would open this .* nonsense", "--for gptqmodel"),
        ({"readers": ("vllm",), "quantize_embeddings": True}, "its embedding is quantized", "quantize-embeddings"),
    ],
)  # fmt: skip
def test_what_a_reader_does_not_take_is_refused_before_the_run(models, values, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        make_plan(options(models("llama"), **{"group_size": 32, **values}))
    assert hint in caught.value.hint


def test_unknown_readers():
    with pytest.raises(UsageError, match=r"unknown reader 'vlm' in --for, .*vllm"):
        options("m", readers=("vlm",))


def test_a_graph_is_for_runtimes(tmp_path):
    with pytest.raises(UsageError, match=r"vllm opens checkpoints, .* is an ONNX graph"):
        (tmp_path / "m.onnx").write_bytes(b"")
        quantize.run(options(tmp_path / "m.onnx", tmp_path / "q", readers=("vllm",)))


def test_experts_go_where_transformers_reads_them(models):
    assert make_plan(options(models("qwen3_moe"), group_size=16)).options.format == "compressed-tensors"
    with pytest.raises(UsageError, match="its experts are quantized one by one"):
        make_plan(options(models("qwen3_moe"), group_size=16, format="gptq"))


def test_rules_of_gptq_for_those_that_ask_otherwise(models, tmp_path):
    override = Override("[qkv]_proj", group_size=16)
    _, config = written(models("llama"), tmp_path / "q", group_size=32, overrides=(override,), exclude=("gate|up",))
    found = config["quantization_config"]
    assert found["meta"]["quantizer"][1] == "gptqmodel:7.6.0"
    rules = found["dynamic"]
    assert rules[r"+:^model\.layers\.0\.self_attn\.qkv_proj$"] == rules[r"+:^model\.layers\.0\.self_attn\.q_proj$"]
    assert rules[r"-:^model\.layers\.1\.mlp\.gate_up_proj$"] == {}
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert found["modules_in_block_to_quantize"] == [[*(f"self_attn.{n}" for n in names), "mlp.down_proj"]]


def test_no_rule_for_shards_that_differ(models, tmp_path):
    _, config = written(models("llama"), tmp_path / "q", group_size=32, overrides=(Override("q_proj", bits=8),))
    assert not any("qkv_proj" in rule for rule in config["quantization_config"]["dynamic"])
    _, config = written(models("llama"), tmp_path / "r", group_size=32, exclude=(r"layers\.0\.",), readers=("vllm",))
    assert "modules_in_block_to_quantize" not in config["quantization_config"]


def test_awq_names_fused_linears_that_stay_float(models, tmp_path):
    _, config = written(models("llama"), tmp_path / "q", group_size=32, format="awq", exclude=("[qkv]_proj",))
    assert "self_attn.qkv_proj" in config["quantization_config"]["modules_to_not_convert"]
    exclude = (r"layers\.0.*[qkv]_proj",)
    _, config = written(models("llama"), tmp_path / "r", group_size=32, format="awq", exclude=exclude)
    kept = config["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.self_attn.qkv_proj" in kept and "self_attn.qkv_proj" not in kept


def test_a_quantized_head_is_named(models, tmp_path):
    _, config = written(models("llama"), tmp_path / "q", group_size=32, quantize_lm_head=True)
    groups = config["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear", "lm_head"]
    _, config = written(
        models("llama"), tmp_path / "r", group_size=32, quantize_lm_head=True, overrides=(Override("lm_head", bits=8),)
    )
    groups = config["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["Linear"], ["lm_head"]]


def test_a_quantized_embedding_is_hidden_from_those_who_would_make_one_up(models, tmp_path):
    written(models("llama-tied"), tmp_path / "q", group_size=32, quantize_embeddings=True)
    with pytest.raises(ValueError, match="llama_quantized_embedding"):
        AutoConfig.from_pretrained(tmp_path / "q/model")
    with pytest.raises(ValueError, match="llama_quantized_embedding"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q/model")
    found = inspect.run(tmp_path / "q")
    assert found.model_type == "llama_quantized_embedding"
    assert found.opens["quantcli"] is None and "embedding" in found.opens["transformers"]
    assert torch.isfinite(quantcli.load(tmp_path / "q")(TOKENS).logits).all()


@pytest.mark.parametrize("dtype", [None, "keep", "float16"])
def test_what_stays_float_of_a_float32_model(models, tmp_path, dtype):
    _, config = written(models("llama"), tmp_path / "q", group_size=32, dtype=dtype)
    source, checkpoint = Checkpoint.open(models("llama")), Checkpoint.open(tmp_path / "q/model")
    wanted = {None: torch.bfloat16, "keep": torch.float32, "float16": torch.float16}[dtype]
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(checkpoint.read(name), source.read(name).to(wanted))
    assert config.get("dtype", "float32") == str(wanted).removeprefix("torch.")


def test_a_float_result_keeps_its_type(models, tmp_path):
    written(models("llama"), tmp_path / "q", group_size=32, format="float")
    assert {e.dtype for e in Checkpoint.open(tmp_path / "q/model").entries.values()} == {torch.float32}


def test_a_small_model_is_one_file(models, tmp_path):
    result, _ = written(models("llama"), tmp_path / "q", group_size=32)
    assert [p.name for p in (tmp_path / "q/model").glob("*.safetensors*")] == ["model.safetensors"]
    assert result.size_bytes == (tmp_path / "q/model/model.safetensors").stat().st_size


def test_a_head_that_was_tied_is_counted_once(models, tmp_path):
    """Its codes take room and bring no new numbers."""
    written(models("llama-tied"), tmp_path / "plain", group_size=32)
    written(models("llama-tied"), tmp_path / "head", group_size=32, quantize_lm_head=True)
    plain, head = inspect.run(tmp_path / "plain"), inspect.run(tmp_path / "head")
    assert plain.parameters == head.parameters
    assert head.bits_per_weight > plain.bits_per_weight and head.size_bytes > plain.size_bytes


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors", "float"])
def test_inspect_says_of_a_folder_what_the_plan_said(models, tmp_path, format):
    for number, values in enumerate(({}, {"exclude": ("down_proj",)}, {"symmetric": True})):
        folder = tmp_path / str(number)
        plan = make_plan(options(models("llama"), folder, group_size=32, format=format, **values))
        written(models("llama"), folder, group_size=32, format=format, **values)
        found = inspect.run(folder)
        assert {name: None if why is None else why.words for name, why in plan.opens.items()} == found.opens
