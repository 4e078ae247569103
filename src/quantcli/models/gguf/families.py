"""Which models llama.cpp computes as transformers does: one table, by model type, and the numbers it wants to know.

What a family's graph in llama.cpp has no place for is refused: a wrong model would open and talk.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.errors import InputError, nearest

__all__ = ["GGUF_FAMILIES", "GgufFamily", "describe", "family_of", "notes", "rope_factors"]

_SILU = ("silu", "swish")
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")
_QKV = ("attn_q", "attn_k", "attn_v")
_ROPES = ("default", "linear", "llama3", "yarn", "longrope")


def _nothing(config: Any) -> None:
    return None


def _adds_nothing(writer: Any, config: Any) -> None:
    return None


@dataclass(frozen=True)
class GgufFamily:
    """What llama.cpp makes of a model type."""

    architecture: str
    """Its name for it."""
    activations: tuple[str, ...] = _SILU
    """What its graph computes between the projections of a feed-forward network."""
    regroups: bool = False
    """Whether rotary embeddings turn neighbouring rows of q and k, so that the halves of each head are interleaved."""
    shifted_norms: bool = False
    """Whether norms are stored as 1 + w."""
    whole_heads: bool = False
    """Whether heads times their size has to be the hidden size."""
    windows: bool = False
    """Whether it computes sliding windows."""
    tied: bool | None = None
    """Whether the head has to be, or must not be, the embedding; None: either."""
    biases: tuple[str, ...] = ()
    """Tensors that may have a bias."""
    refuse: Callable[[Any], str | None] = _nothing
    """What else of a configuration it has no place for, in words."""
    describe: Callable[[Any, Any], None] = _adds_nothing
    """(gguf.GGUFWriter, configuration): numbers that only it has."""


def _refuse_gpt2(config: Any) -> str | None:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return "its attention scores are scaled otherwise"
    return None


def _refuse_scaled(config: Any) -> str | None:
    """Gemma's own scale of attention scores: by the head size, but for the largest models."""
    largest = config.num_hidden_layers == (62 if config.model_type == "gemma3_text" else 46)
    expected = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    if config.query_pre_attn_scalar != expected:
        return f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, it takes {expected} for granted"
    if config.model_type == "gemma3_text" and config.attn_logit_softcapping:
        return "attention scores are capped"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention looks ahead"
    return None


def _refuse_experts(config: Any) -> str | None:
    if bool(config.norm_topk_prob) != (config.model_type == "qwen3_moe"):
        return f"norm_topk_prob is {config.norm_topk_prob}"
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "some layers have no experts"
    return None


def _describe_experts(writer: Any, config: Any) -> None:
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    shared = getattr(config, "shared_expert_intermediate_size", None)
    if shared:
        writer.add_expert_shared_feed_forward_length(shared)


def _describe_gemma(writer: Any, config: Any) -> None:
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    if any(sliding):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(sliding)


def _describe_phi3(writer: Any, config: Any) -> None:
    writer.add_sliding_window(0)  # it has none in its graph; without the key it would take some for granted
    parameters = _rope(config)
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)


_LLAMA = GgufFamily("llama", regroups=True, biases=(*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"))
_GEMMA = GgufFamily("gemma", activations=("gelu_pytorch_tanh",), shifted_norms=True, tied=True, biases=_QKV)

GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": GgufFamily("qwen2", whole_heads=True, biases=_QKV),
    "qwen3": GgufFamily("qwen3", biases=_QKV),
    "qwen2_moe": GgufFamily(
        "qwen2moe",
        whole_heads=True,
        tied=False,
        biases=_QKV,
        refuse=_refuse_experts,
        describe=_describe_experts,
    ),
    "qwen3_moe": GgufFamily("qwen3moe", biases=_QKV, refuse=_refuse_experts, describe=_describe_experts),
    "gemma": _GEMMA,
    "gemma2": GgufFamily(
        "gemma2",
        activations=("gelu_pytorch_tanh",),
        shifted_norms=True,
        tied=True,
        windows=True,
        biases=_QKV,
        refuse=_refuse_scaled,
        describe=_describe_gemma,
    ),
    "gemma3_text": GgufFamily(
        "gemma3",
        activations=("gelu_pytorch_tanh",),
        shifted_norms=True,
        windows=True,
        biases=_QKV,
        refuse=_refuse_scaled,
        describe=_describe_gemma,
    ),
    "phi3": GgufFamily("phi3", whole_heads=True, describe=_describe_phi3),
    "gpt2": GgufFamily(
        "gpt2",
        activations=_GELU_TANH,
        whole_heads=True,
        biases=("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"),
        refuse=_refuse_gpt2,
    ),
}
"""By transformers' model type. Each is opened in llama.cpp by `tests/formats/test_llama_cpp.py`."""


def family_of(config: Any) -> GgufFamily:
    """The family of a model, once it is known that llama.cpp computes it as transformers does.

    Raises:
        InputError: it does not, or we do not know it.
    """
    name = config.model_type
    if name not in GGUF_FAMILIES:
        raise InputError(
            f"{name} is not written as GGUF: {nearest(name, GGUF_FAMILIES)}",
            hint="use --format gptq, awq or compressed-tensors",
        )
    family = GGUF_FAMILIES[name]
    why = _why_not(config, family)
    if why is not None:
        raise InputError(
            f"llama.cpp's {family.architecture} is not this {name}: {why}",
            hint="use --format gptq, awq or compressed-tensors",
        )
    return family


def _why_not(config: Any, family: GgufFamily) -> str | None:
    activation = next(
        (getattr(config, n) for n in ("hidden_activation", "hidden_act", "activation_function") if hasattr(config, n)),
        None,
    )
    if activation not in family.activations:
        return f"its activation is {activation}, not {family.activations[0]}"
    heads, size = config.num_attention_heads, _head_size(config)
    if family.whole_heads and heads * size != config.hidden_size:
        return f"{heads} heads of {size} are not its {config.hidden_size} columns"
    kind = _rope(config).get("rope_type", "default")
    if kind not in _ROPES:
        return f"rotary embeddings of type {kind}"
    if kind == "longrope" and family.architecture != "phi3":
        return "rotary embeddings of type longrope"
    if kind == "yarn" and any(_rope(config).get(name) for name in ("attention_factor", "mscale", "mscale_all_dim")):
        return "yarn with a factor of attention of its own"
    return family.refuse(config)


def notes(config: Any, family: GgufFamily) -> list[str]:
    """What llama.cpp computes otherwise, though not for short texts."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    slides = window and (not kinds or "sliding_attention" in kinds) and getattr(config, "use_sliding_window", True)
    if slides and not family.windows and window < config.max_position_embeddings:
        return [
            f"llama.cpp's {family.architecture} has no sliding window: beyond {window} tokens it attends to more than "
            "the model was trained to"
        ]
    return []


def describe(writer: Any, config: Any, family: GgufFamily) -> None:
    """Tells a gguf.GGUFWriter the numbers of a model.

    Args:
        writer: Of the family's architecture.
        config: transformers' configuration of the text model.
        family: Its entry in the table.
    """
    heads, size = config.num_attention_heads, _head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or _inner(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "rope_parameters", None):
        _describe_rope(writer, config, size)
    family.describe(writer, config)


def rope_factors(config: Any) -> dict[str, Sequence[float]]:
    """Tensors that divide rotary frequencies, by their name in the file: of llama3's scaling and of longrope's."""
    parameters = _rope(config)
    kind = parameters.get("rope_type", "default")
    if kind == "longrope":
        return {
            "rope_factors_long.weight": parameters["long_factor"],
            "rope_factors_short.weight": parameters["short_factor"],
        }
    if kind != "llama3":
        return {}
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    exponents = torch.arange(len(found), dtype=torch.float32) / len(found)
    factors: list[float] = ((1.0 / parameters["rope_theta"] ** exponents) / found).tolist()
    return {"rope_freqs.weight": factors}


def _describe_rope(writer: Any, config: Any, size: int) -> None:
    import gguf

    parameters = _rope(config)
    writer.add_rope_dimension_count(int(size * parameters.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(parameters["rope_theta"])
    local = config.rope_parameters.get("sliding_attention")
    if isinstance(local, dict):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = parameters.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        for name, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if parameters.get(name) is not None:
                add(parameters[name])
    if kind == "longrope":
        import torch
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        _, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(factor)


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters, of full attention where there are two kinds."""
    parameters = getattr(config, "rope_parameters", None) or {}
    found: dict[str, Any] = parameters.get("full_attention", parameters)
    return found


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _inner(config: Any) -> int:
    return int(getattr(config, "n_inner", None) or 4 * config.hidden_size)
