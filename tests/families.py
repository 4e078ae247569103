"""A tiny random model of every family that quantcli knows, and of some that it must find its way in by itself."""

from functools import partial
from pathlib import Path

import torch
import transformers as t

from tiny_models import save as save

VOCABULARY = 272  # 256 bytes and a few more: unlike any layer size
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_OLD = {k: _SMALL[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")}
_EXPERTS = _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_SLIDING = {"head_dim": 16, "sliding_window": 16}

KNOWN = {
    "llama": lambda: t.LlamaConfig(**_GROUPED),
    "llama-tied": lambda: t.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "mistral": lambda: t.MistralConfig(**_GROUPED, sliding_window=16),
    "qwen2": lambda: t.Qwen2Config(**_GROUPED),
    "qwen3": lambda: t.Qwen3Config(**_GROUPED, head_dim=16),
    "gemma": lambda: t.GemmaConfig(**_GROUPED, head_dim=16),
    "gemma2": lambda: t.Gemma2Config(**_GROUPED, **_SLIDING),
    "gemma3": lambda: t.Gemma3TextConfig(
        **_GROUPED, **_SLIDING, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: t.Phi3Config(**_GROUPED),
    "gpt2": lambda: t.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **_OLD),
    "gpt_neox": lambda: t.GPTNeoXConfig(**_SMALL),
    "opt": lambda: t.OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
        word_embed_proj_dim=64, pad_token_id=0, **_OLD,
    ),
    "falcon": lambda: t.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **_OLD),
    "falcon-alibi": lambda: t.FalconConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True, **_OLD
    ),
    "mixtral": lambda: t.MixtralConfig(**_GROUPED, num_local_experts=4),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(**_EXPERTS, shared_expert_intermediate_size=80),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**_EXPERTS, head_dim=16),
}  # fmt: skip
FOUND = {
    "olmo2": lambda: t.Olmo2Config(**_SMALL),
    "stablelm": lambda: t.StableLmConfig(**_SMALL, num_key_value_heads=4),
    "phi": lambda: t.PhiConfig(**_SMALL),
}
FAMILIES = KNOWN | FOUND


def build(family: str, seed: int = 0) -> torch.nn.Module:
    """A model whose weights are larger than usual, so that its blocks matter to its logits."""
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


def norms_in_float64(model: torch.nn.Module) -> None:
    """Models compute their norms in float32, whatever they are given; this one no longer does."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm64, module, float(type(module).__name__.startswith("Gemma")))


def _norm64(module: torch.nn.Module, offset: float, hidden: torch.Tensor) -> torch.Tensor:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return (offset + module.weight) * hidden / (hidden.square().mean(-1, keepdim=True) + eps).sqrt()


def write_text(path: Path, words: int = 2000, seed: int = 0) -> Path:
    """Random words: enough text for a few short rows."""
    letters = torch.randint(0, 26, (words, 4), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text(" ".join("".join(chr(97 + n) for n in word) for word in letters))
    return path


ROTATABLE = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3", "gemma", "mixtral", "qwen2_moe", "qwen3_moe"]


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 model that computes in float64 throughout."""
    model.set_experts_implementation("eager")  # grouped products know no float64
    norms_in_float64(model)
    return model
