"""A tiny random model of any causal language model class that the installed transformers has.

Sizes are unlike each other and unlike the vocabulary, so that a transposed matrix is found; weights are large enough
for logits to vary and for several experts to be chosen.
"""

import re
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["CAUSAL", "build", "save", "tiny_config"]

CAUSAL: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model types of transformers' mapping of causal language models."""

VOCABULARY = 272  # 256 bytes and a few more
_HIDDEN, _INNER, _HEADS, _HEAD = 64, 96, 4, 16
# sizes by the names that configurations give them
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": _HIDDEN, "d_model": _HIDDEN, "n_embd": _HIDDEN, "n_embed": _HIDDEN, "emb_dim": _HIDDEN,
    "dim": _HIDDEN, "embedding_size": _HIDDEN, "input_embedding_size": _HIDDEN, "word_embed_proj_dim": _HIDDEN,
    "lru_width": _HIDDEN, "dim_model": _HIDDEN, "axial_pos_embds_dim": (16, 48), "attention_hidden_size": _HIDDEN,
    "intermediate_size": _INNER, "ffn_dim": _INNER, "n_inner": _INNER, "dff": _INNER, "d_inner": _INNER,
    "dim_ff": _INNER, "ffn_hidden_size": _INNER, "decoder_ffn_dim": _INNER, "encoder_ffn_dim": _INNER,
    "intermediate_size_mlp": 112, "dense_intermediate_size": 112, "mlp_hidden_size": _INNER, "ff_dim": _INNER,
    "feed_forward_size": _INNER, "attention_dim": _HIDDEN, "shared_intermediate_size": 80,
    "moe_intermediate_size": 48, "expert_ffn_hidden_size": 48, "shared_expert_intermediate_size": 80,
    "moe_shared_expert_intermediate_size": 80, "moe_latent_size": None, "expert_ffn_size": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": _HEADS, "n_head": _HEADS, "n_heads": _HEADS, "decoder_attention_heads": _HEADS,
    "encoder_attention_heads": _HEADS, "num_heads": _HEADS, "num_decoder_attention_heads": _HEADS,
    "num_encoder_attention_heads": _HEADS, "num_key_value_heads": 2, "num_swa_attention_heads": _HEADS,
    "swa_num_attention_heads": _HEADS, "swa_num_key_value_heads": 2, "swa_head_dim": _HEAD, "swa_v_head_dim": _HEAD,
    "head_dim": _HEAD, "kv_channels": _HEAD, "d_kv": _HEAD, "global_head_dim": _HEAD, "attention_head_dim": _HEAD,
    "dim_head": _HEAD, "v_head_dim": _HEAD, "qk_nope_head_dim": _HEAD, "qk_rope_head_dim": 8, "qk_head_dim": 24,
    "q_lora_rank": 48, "kv_lora_rank": 32, "o_lora_rank": 32, "o_groups": 2, "linear_key_head_dim": _HEAD,
    "linear_value_head_dim": _HEAD,
    "linear_head_dim": _HEAD, "linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "rotary_dim": 8,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "block_size": 16,
    "seq_length": 128, "max_target_positions": 128, "max_sequence_length": 128, "context_length": 128,
    "sliding_window": 16, "attention_window_size": 16, "attention_chunk_size": 32, "window_size": 16,
    "local_window": 16,
    "axial_pos_shape": (8, 16), "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_top_k": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "zero_expert_num": 2, "num_shared_experts": 1, "num_nextn_predict_layers": 0, "moe_num_shared_experts": 1,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2, "mamba_d_ssm": 128,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "state_size": 16, "mamba_dt_rank": 8,
    "n_mamba_heads": 2, "mamba_headdim": 16, "mamba_ngroups": 1, "mamba_n_groups": 1, "n_groups": 1,
    "time_step_rank": 8, "chunk_size": 16, "mamba_chunk_size": 16, "expand": 2, "conv_L_cache": 3,
    "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "laurel_rank": 16, "altup_num_inputs": 2,
    "index_head_dim": _HEAD, "index_n_heads": 2, "index_topk": 16, "num_mem_blocks": 1, "adapter_rank": 8,
    "compressor_head_dim": _HEAD, "hc_mult": 2, "num_hash_layers": 0, "num_buckets": 4, "num_hashes": 1,
    "lsh_num_chunks_before": 1, "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "num_codebooks": 1, "num_languages": 1, "qk_dim_factor": 0.5,
    "dim_bucket_segment": 8, "attention_rope_dim": 8,
}  # fmt: skip
# what one kind needs beside the sizes
_OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 1.0}, "cohere2": {"logit_scale": 1.0}, "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "dots3_note": {"num_key_value_heads": _HEADS}, "dots3_note_text": {"num_key_value_heads": _HEADS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "reformer": {"is_decoder": True},
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
              "num_hidden_layers": 4, "attention_head_dim": 32, "attention_hidden_size": 128},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
               "num_hidden_layers": 4, "attention_head_dim": 32, "attention_hidden_size": 128, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {"indexer_budget": 32, "indexer_compress_ratio": 4},
    "qwen4_exp": {"text_config": {"indexer_budget": 32, "indexer_compress_ratio": 4}},
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """A small configuration of one model type."""
    return _shrink(CONFIG_MAPPING[model_type], _OWN.get(model_type, {}))


def _shrink(kind: type, own: dict[str, Any]) -> Any:
    default = kind()
    known = {**default.to_dict(), **default.__dict__, **dict.fromkeys(default.attribute_map)}
    values = {name: value for name, value in _SIZES.items() if name in known}
    if "qk_rope_head_dim" in known and "head_dim" in values:  # of the rotated part, where there is one
        values |= {"head_dim": values["qk_rope_head_dim"], "num_key_value_heads": _HEADS}
    for alias, name in default.attribute_map.items():  # one of the two names is enough
        if alias in values and name in values:
            del values[alias]
    for name, value in default.__dict__.items():
        if isinstance(value, t.PreTrainedConfig):
            values[name] = _shrink(type(value), own.get(name, {}))
        elif re.search("layer_types|layers_block_type", name) and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            values[name] = (kinds * 2)[: max(2, len(kinds))]
            for count in ("num_hidden_layers", "n_layer", "num_layers"):
                if count in values and name not in own:
                    values[count] = len(values[name])
    return kind(**(values | own))


def build(model_type: str, seed: int = 0) -> Any:
    """A model whose weights are larger than usual, so that its blocks matter to its logits."""
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv" not in name and "A_log" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.08)
            elif parameter.ndim == 1 and "norm" not in name.lower() and "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def save(model: Any, folder: Path, **settings: Any) -> Path:
    """Writes model and a byte-level tokenizer, the one kind that every family's tokenizer class takes as it is."""
    model.save_pretrained(folder, **settings)
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder
