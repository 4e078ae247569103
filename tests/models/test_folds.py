"""Where scales of inputs can be undone, found by trying: in each family what is known of it, and never a wrong one."""

import pytest
import torch
from torch import nn

import families
from quantcli.models.block import BlockCall, block_stages, forward
from quantcli.models.folds import divide_rows, find_folds, folded_norm, is_transposed
from quantcli.models.layout import find_layout
from quantcli.models.walk import embed_tokens

_LLAMA = {
    "q_proj": "input_layernorm",
    "o_proj": "v_proj",
    "gate_proj": "post_attention_layernorm",
    "down_proj": "up_proj",
}
_GEMMA2 = _LLAMA | {"gate_proj": "pre_feedforward_layernorm"}
_ATTENTION = {"q_proj": "input_layernorm", "o_proj": "v_proj"}
# family to {first linear of a stage: producer}, both without the path before them
KNOWN = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
    "phi3": {
        "qkv_proj": "input_layernorm",
        "o_proj": "qkv_proj",
        "gate_up_proj": "post_attention_layernorm",
        "down_proj": "gate_up_proj",
    },
    "gpt2": {"c_attn": "ln_1", "attn.c_proj": "c_attn", "c_fc": "ln_2"},
    "opt": {"q_proj": "self_attn_layer_norm", "out_proj": "v_proj", "fc1": "final_layer_norm", "fc2": "fc1"},
    "mixtral": _ATTENTION,
    "qwen3_moe": _ATTENTION,
}


def scene(family):
    model = families.build(family)
    layout = find_layout(model)
    with torch.no_grad():
        hidden, calls = embed_tokens(model, layout, torch.arange(5, 29)[None], 1)
    block = model.get_submodule(layout.blocks[0])
    names = [n.removeprefix(layout.blocks[0] + ".") for n in layout.linears if n.startswith(layout.blocks[0] + ".")]
    call = calls[0][0]
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        stages = block_stages(block, names, hidden[0], call)
        before = {n: p.clone() for n, p in block.named_parameters()}
        folds = find_folds(block, stages, hidden[0], call, head_dim)
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())
    return block, stages, hidden[0], call, folds


@pytest.mark.parametrize("family", KNOWN)
def test_known_families(family):
    *_, folds = scene(family)
    expected = KNOWN[family]
    found = {}
    for name, fold in folds.items():
        key = next((k for k in expected if name.endswith(k)), name)
        found[key] = fold.producer.rsplit(".", 1)[-1]
    assert found == expected
    assert any(f.offset for f in folds.values()) == family.startswith("gemma")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_any_scale_leaves_the_function(family):
    """Every fold that is found, all at once, with scales that are no powers of two."""
    block, stages, hidden, call, folds = scene(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        expected = forward(block, hidden, call)
        for names in stages:
            fold = folds.get(names[0])
            if fold is None:
                continue
            columns = block.get_submodule(names[0])
            count = columns.weight.shape[0 if is_transposed(columns) else 1]
            given = torch.arange(count) if fold.rows is None else fold.rows
            rows, shared = torch.unique(given, return_inverse=True)
            scale = torch.exp(0.5 * torch.randn(len(rows), generator=generator))
            producer = block.get_submodule(fold.producer)
            if fold.is_norm:
                gain, scale = folded_norm(producer.weight, scale, fold.offset)
                producer.weight.data = gain
            else:
                producer.weight.data = divide_rows(producer.weight, rows, scale, is_transposed(producer))
            if getattr(producer, "bias", None) is not None:
                producer.bias.data = divide_rows(producer.bias, rows, scale)
            for name in names:
                linear = block.get_submodule(name)
                factor = scale[shared]
                linear.weight.data *= factor[:, None] if is_transposed(linear) else factor
        found = forward(block, hidden, call)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert folds


class _Branches(nn.Module):
    """A norm that feeds a linear and, unscaled, a gate."""

    def __init__(self, gated):
        super().__init__()
        self.norm, self.linear, self.gate = nn.LayerNorm(8), nn.Linear(8, 8), nn.Parameter(torch.randn(8))
        self.gated = gated

    def forward(self, hidden):
        x = self.norm(hidden)
        out = self.linear(x)
        return hidden * 1e4 + (out * torch.sigmoid((x * self.gate).sum(-1, keepdim=True)) if self.gated else out)


@pytest.mark.parametrize("gated", [True, False])
def test_a_norm_that_feeds_something_else_is_left_alone(gated):
    torch.manual_seed(0)
    block = _Branches(gated)
    with torch.no_grad():
        folds = find_folds(block, [["linear"]], torch.randn(1, 6, 8), BlockCall((), {}))
    assert (folds == {}) == gated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [True, False])
def test_a_norms_gain_and_scale_multiply_to_what_was(dtype, offset):
    torch.manual_seed(0)
    weight = torch.randn(64).to(dtype)
    weight[3] = 0
    scale = torch.exp(torch.randn(64))
    gain, amounts = folded_norm(weight, scale, offset)
    assert gain.dtype == dtype
    assert torch.allclose((gain.float() + offset) * amounts, weight.float() + offset, rtol=1e-6)
    near = (amounts / scale - 1).abs() < 0.02
    assert near[((weight.float() + offset) / scale).abs() > 0.3].all()
