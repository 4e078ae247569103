"""Tiny random models whose rows hold whole super-blocks, with tokenizers of the kinds that llama.cpp knows."""

import json
from pathlib import Path

import torch
import transformers as t
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from quantcli.models.gguf import vocabulary

VOCABULARY = 384
_SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_EXPERTS = _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_GEMMA = _GROUPED | {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: t.LlamaConfig(**_GROUPED),
    "llama-tied": lambda: t.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama-biased": lambda: t.LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True),
    "llama-scaled": lambda: t.LlamaConfig(**_GROUPED, rope_parameters=_LLAMA3),
    "mistral": lambda: t.MistralConfig(**_GROUPED, head_dim=32, sliding_window=None),
    "qwen2": lambda: t.Qwen2Config(**_GROUPED),
    "qwen3": lambda: t.Qwen3Config(**_GROUPED, head_dim=32),
    "gemma": lambda: t.GemmaConfig(**_GROUPED, head_dim=64, hidden_activation="gelu_pytorch_tanh"),
    "gemma2": lambda: t.Gemma2Config(**_GEMMA),
    "gemma3": lambda: t.Gemma3TextConfig(**_GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "phi3": lambda: t.Phi3Config(**_GROUPED),
    "gpt2": lambda: t.GPT2Config(
        n_embd=256, n_layer=2, n_head=4, n_positions=256, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": lambda: t.MixtralConfig(**_GROUPED, num_local_experts=4),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(**_EXPERTS, shared_expert_intermediate_size=256),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**_EXPERTS, head_dim=32, norm_topk_prob=True),
}
WORDS = "the cat sat on a mat hello world 123 and don't I'll we have been there trail lead spaces naïve été 日本"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
_SPECIAL = ["<pad>", "<s>", "</s>"]


def save(family: str, folder: Path, tokenizer: str = "gpt-2", **settings) -> Path:
    """Writes a model whose blocks and norms matter, and a tokenizer."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    for name, value in settings.items():
        setattr(config, name, value)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    wrapped = t.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[tokenizer](), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    return folder


def text(folder: Path) -> Path:
    """Something to calibrate on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(f"{WORDS} " * 200)
    return folder / "text.txt"


def _byte_level(steps, ignore_merges=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    cuts = [
        pre_tokenizers.Digits(individual_digits=True)
        if step == vocabulary._DIGITS
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
        if step == vocabulary._BYTE_LEVEL
        else pre_tokenizers.Split(Regex(step), "isolated")
        for step in steps
    ]
    if vocabulary._BYTE_LEVEL not in steps:
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 4,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{WORDS} " * 3], trainer)
    return tokenizer


def sentencepiece_bpe(prefix: bool = True):
    """As llama 2 and gemma have them: bytes to fall back on, every way to merge a token allowed."""
    words = [f"▁{word}" for word in WORDS.split()]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=110, special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator(words * 3, trainer)
    merged = [
        token
        for token in sorted(trained.get_vocab(), key=trained.get_vocab().get)
        if len(token) > 1 and token != "<unk>"
    ]
    letters = sorted({letter for word in words for letter in word})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *merged]
    known = {token: i for i, token in enumerate(tokens[: VOCABULARY - 8])}
    merges = [
        (token[:i], token[i:])
        for token in merged
        if token in known
        for i in range(1, len(token))
        if token[:i] in known and token[i:] in known
    ]
    tokenizer = Tokenizer(models.BPE(known, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    return tokenizer


TOKENIZERS = {
    name: (lambda steps=steps, whole=whole: _byte_level(steps, whole))
    for (steps, whole), name in vocabulary._CUTS.items()
} | {"llama": sentencepiece_bpe, "gemma": lambda: sentencepiece_bpe(prefix=False)}
"""By llama.cpp's name of how they cut text, and two of SentencePiece's."""


def facts(folder: Path) -> dict:
    """tokenizer.json."""
    return json.loads((folder / "tokenizer.json").read_text())
