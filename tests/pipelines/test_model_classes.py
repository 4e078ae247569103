"""Representatives of transformers' classes, whole: every matrix quantized, read back, computing what was written."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import quantcli
import tiny_models
import try_models
from quantcli.algorithms import find
from quantcli.errors import InputError, UsageError
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.conversion import as_in_model
from quantcli.models.experts import show_all_tokens
from quantcli.models.skeleton import build_skeleton, materialize
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines import inspect, quantize
from quantcli.scheme import Scheme
from tiny import Warnings

TOKENS = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(1))
# experts in one tensor and apart, either way round, with biases, without gates, called by other names, for all tokens
EXPERTS = ["qwen3_moe", "gpt_oss", "llama4_text", "jetmoe", "nemotron_h", "inkling_text", "longcat_flash", "mixtral"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")

    def get(family):
        if not (root / family).exists():
            tiny_models.save(tiny_models.build(family), root / family)
        return root / family

    return get


def run(source, output, algorithm="rtn", progress=None, **settings):
    text = {"num_samples": 4, "seq_len": 32, "data": "builtin"} if algorithm == "gptq" else {}
    moe = {k: settings.pop(k) for k in ("moe_calibration",) if k in settings}
    calibration = CalibrationOptions(**text, **moe)
    return quantize.run(
        QuantizeOptions(
            str(source), output, algorithm=algorithm, group_size=16, dtype="keep", calibration=calibration, **settings
        ),
        progress,
    )


@pytest.mark.parametrize("family", ["opt", "gpt_oss", "llama4_text", "granitemoehybrid", "mamba2", "zamba2", "jamba"])
def test_what_is_loaded_is_what_was_written(folder, tmp_path, family):
    found = try_models.try_method("gptq", folder(family), tmp_path / "q")
    assert found["state"] == "right", found
    assert found["share"] > 0.9


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_taken_apart_compute_what_they_did(folder, family):
    source = folder(family)
    expected = try_models.logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), TOKENS)
    skeleton = build_skeleton(source)
    tensors = as_in_model(Checkpoint.open(source), skeleton)
    assert skeleton.stacked and not tensors.unknown
    state = skeleton.state_dict()
    materialize(skeleton, {name: tensors.read(tensors.names[name]) for name in state if name in tensors.names})
    skeleton.tie_weights()
    torch.testing.assert_close(try_models.logits(skeleton, TOKENS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_each_expert_has_a_grid_of_its_own(folder, tmp_path, family):
    """As if its matrix, cut out of the file by hand, had been the only one."""
    source = folder(family)
    run(source, tmp_path / "q", symmetric=False)
    loaded = quantcli.load(tmp_path / "q")
    with safe_open(source / "model.safetensors", "pt") as file:
        fused = {n: file.get_tensor(n) for n in file.keys() if file.get_slice(n).get_shape()[1:] and "layers.1." in n}  # noqa: SIM118
        fused = {n: t for n, t in fused.items() if t.ndim == 3}
    assert len(fused) == 2
    rtn = find("rtn")
    for name, tensor in fused.items():
        stack = max(
            (s for s in loaded.stacked.values() if "layers.1." in s.owner and s.shape == tuple(tensor.shape)),
            key=lambda s: s.parameter.startswith("gate_up") == ("input" in name or "gate_up" in name),
        )
        for expert, matrix in enumerate(tensor):
            matrix = matrix.T if stack.transposed else matrix
            for leaf in stack.leaves:
                part = matrix[stack.rows(leaf)].contiguous()
                expected = rtn.run(part, Scheme(4, 16), rtn.options(), None).dequantize()
                layer = loaded.get_submodule(f"{stack.owner}.{expert}.{leaf}")
                torch.testing.assert_close(layer.dequantize(), expected, rtol=0, atol=1e-3 * float(part.abs().max()))


@pytest.mark.parametrize(("family", "all_tokens"), [("qwen3_moe", True), ("qwen3_moe", False), ("gpt_oss", True)])
def test_experts_see_their_tokens_or_all(folder, tmp_path, family, all_tokens):
    result = run(folder(family), tmp_path / "q", "gptq", moe_calibration="all" if all_tokens else "routed")
    seen = [layer.tokens for layer in result.layers if ".experts." in layer.name and layer.kind == "down_proj"]
    assert len(seen) >= 4
    if all_tokens:
        dense = next(layer.tokens for layer in result.layers if layer.kind == "q_proj")
        assert set(seen) == {dense}
    else:
        assert len(set(seen)) > 1


def test_all_tokens_leave_the_output_alone(folder):
    model = AutoModelForCausalLM.from_pretrained(folder("qwen3_moe")).eval()
    skeleton = build_skeleton(folder("qwen3_moe"))
    tensors = as_in_model(Checkpoint.open(folder("qwen3_moe")), skeleton)
    materialize(skeleton, {n: tensors.read(tensors.names[n]) for n in skeleton.state_dict() if n in tensors.names})
    expected = try_models.logits(model, TOKENS)
    for block in skeleton.model.layers:
        show_all_tokens(block)
    torch.testing.assert_close(try_models.logits(skeleton, TOKENS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama4_text", "jetmoe"])
def test_experts_that_are_not_given_their_tokens_refuse_all(folder, tmp_path, family):
    with pytest.raises(UsageError, match="--moe-calibration all would have no effect on"):
        run(folder(family), tmp_path / "q", "gptq", moe_calibration="all")


def test_experts_that_few_tokens_reach_are_named(folder, tmp_path):
    progress = Warnings()
    calibration = CalibrationOptions(data="builtin", num_samples=1, seq_len=16)
    options = QuantizeOptions(
        str(folder("qwen3_moe")), tmp_path / "q", algorithm="gptq", group_size=16, calibration=calibration
    )
    result = quantize.run(options, progress)
    few = [layer.name for layer in result.layers if ".experts." in layer.name and layer.tokens == 0]
    (line,) = [said for said in progress.said if "too few calibration tokens" in said]
    assert few and few[0] in line and f"{len(few)} matrices" in line and "--moe-calibration all" in line


def test_a_small_share_is_refused_unless_allowed(folder, tmp_path):
    with pytest.raises(InputError, match=r"only .* of matrix parameters quantized") as caught:
        run(folder("inkling_text"), tmp_path / "q")
    assert "--allow-partial" in caught.value.hint and not (tmp_path / "q").exists()
    result = run(folder("inkling_text"), tmp_path / "q", allow_partial=True)
    manifest = json.loads((tmp_path / "q/quantcli.json").read_text())
    assert manifest["metrics"]["share"]["words"] == result.share.words == inspect.run(tmp_path / "q").share["words"]
    assert any("no linear" in one.reason and one.counts for one in result.share.left)
    assert any(one.kind.startswith("routers") for one in result.share.left)


def test_experts_that_stay_float_are_written_as_they_stood(folder, tmp_path):
    source = folder("gpt_oss")
    run(source, tmp_path / "q", exclude=("experts",))
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "q/model")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(before.read(name), after.read(name))
    assert not any(".experts.0." in n for n in after.entries)
    assert quantcli.load(tmp_path / "q").stacked
