"""The folders that readers are shown: tiny models, and formats with their options. A case more is a row more."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as t

import families
from quantcli.options import CalibrationOptions, Override, QuantizeOptions
from quantcli.pipelines import quantize

__all__ = ["CASES", "FAMILIES", "TOKENS", "Case", "folder_name", "options_of", "write_folder", "write_models"]

VOCABULARY = 288
TOKENS = [1, *(3 + 37 * n % 256 for n in range(23))]
"""What every reader is asked about."""
_SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_OLD = {name: _SMALL[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
FAMILIES = {
    "llama": lambda: t.LlamaConfig(**_SMALL),
    "qwen2": lambda: t.Qwen2Config(**_SMALL),
    "qwen3": lambda: t.Qwen3Config(**_SMALL, head_dim=32),
    "gemma3": lambda: t.Gemma3TextConfig(
        **_SMALL | {"tie_word_embeddings": True}, head_dim=32, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": lambda: t.Phi3Config(**_SMALL),
    "gpt2": lambda: t.GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=128, **_OLD),
    "opt": lambda: t.OPTConfig(
        hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
        word_embed_proj_dim=128, pad_token_id=0, **_OLD,
    ),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(
        **_SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}  # fmt: skip
_DENSE = tuple(name for name in FAMILIES if name != "qwen3_moe")
_LINEAR = tuple(name for name in _DENSE if name != "gpt2")  # compressed-tensors knows no Conv1D


@dataclass(frozen=True)
class Case:
    """One way to quantize."""

    name: str
    """As the matrix shows it."""
    format: str
    """As in `--format`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `QuantizeOptions`."""
    families: tuple[str, ...] = ("llama",)
    """Models that it is tried with."""


_TEXT = {"algorithm": "gptq", "calibration": CalibrationOptions("builtin", num_samples=2, seq_len=32)}
CASES = (
    Case("4 bits (the default)", "gptq", families=tuple(FAMILIES)),
    Case("8 bits", "gptq", {"bits": 8}),
    Case("3 bits, asym", "gptq", {"bits": 3, "symmetric": False}),
    Case("asym", "gptq", {"symmetric": False}),
    Case("desc_act", "gptq", _TEXT | {"settings": {"order": "desc_act"}}),
    Case("one scale per row", "gptq", {"group_size": -1}),
    Case("groups of 48", "gptq", {"group_size": 48}),
    Case("down_proj 8 bits", "gptq", {"overrides": (Override("down_proj", bits=8),)}),
    Case("q, k, v 8 bits", "gptq", {"overrides": (Override("[qkv]_proj", bits=8),)}),
    Case("q_proj 8 bits", "gptq", {"overrides": (Override("q_proj", bits=8),)}),
    Case("o_proj float", "gptq", {"exclude": ("o_proj",)}),
    Case("q, k, v of a block float", "gptq", {"exclude": (r"layers\.0\..*[qkv]_proj",)}),
    Case("head", "gptq", {"quantize_lm_head": True}),
    Case("embedding", "gptq", {"quantize_embeddings": True}),
    Case("asym", "awq", {"symmetric": False}, _DENSE),
    Case("sym", "awq", {"symmetric": True}),
    Case("o_proj float", "awq", {"exclude": ("o_proj",)}),
    Case("sym", "compressed-tensors", families=(*_LINEAR, "qwen3_moe")),
    Case("8 bits, one scale per row", "compressed-tensors", {"bits": 8, "group_size": -1}),
    Case("asym", "compressed-tensors", {"symmetric": False}),
    Case("down_proj 8 bits, o_proj float", "compressed-tensors",
         {"overrides": (Override("down_proj", bits=8),), "exclude": ("o_proj",)}),
    Case("head", "compressed-tensors", {"quantize_lm_head": True}),
    Case("W8A8, dynamic", "int-quantized", {"group_size": None}),
    Case("W8A8, static", "int-quantized", _TEXT | {"group_size": None, "activations": "static"}),
    Case("weights only", "nvfp4-pack-quantized", {"group_size": None, "activations": "float"}),
    Case("weights only", "mxfp4-pack-quantized", {"group_size": None, "activations": "float"}),
    Case("nf4", "bnb", {"algorithm": "nf4"}, _DENSE),
    Case("fp4, double", "bnb", {"algorithm": "fp4", "settings": {"double_quant": "true"}}),
    Case("nf4, head", "bnb", {"algorithm": "nf4", "quantize_lm_head": True}),
    Case("LLM.int8()", "bnb-int8", _TEXT | {"algorithm": "llm-int8", "group_size": None}, _DENSE),
    Case("dequantized", "float", families=tuple(FAMILIES)),
)  # fmt: skip
"""Formats that are added to quantcli get their rows here."""


def folder_name(case: Case, family: str) -> str:
    """One word for files."""
    return "".join(c if c.isalnum() or c == "." else "-" for c in f"{family} {case.format} {case.name}")


def options_of(case: Case, model: Path, output: Path) -> QuantizeOptions:
    """What `quantize` is asked for; quantcli itself takes all of it, so no reader is in the way."""
    values = {"algorithm": "rtn", "group_size": 32, "device": "cpu", "readers": ("quantcli",), "force": True}
    return QuantizeOptions(str(model), output, format=case.format, **values | case.options)


def write_models(root: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """The float models, once."""
    found = {}
    for name in names:
        found[name] = root / name
        if not (root / name / "tokenizer.json").is_file():
            torch.manual_seed(0)
            model = t.AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.float32).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
                    if parameter.ndim >= 2:
                        parameter.mul_(3)
            families.save(model, root / name)
    return found


def write_folder(case: Case, family: str, models: dict[str, Path], root: Path) -> Path:
    """Quantizes; the model folder."""
    output = root / folder_name(case, family)
    if not output.is_dir():
        quantize.run(options_of(case, models[family], output))
    return output / "model"
