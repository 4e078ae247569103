"""Tiny random checkpoints with a word-level tokenizer, made as a user would have them: by save_pretrained."""

import atexit
import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from quantcli.progress import Silent

VOCABULARY = 200
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "gemma3_text": _DECODER | {"head_dim": 16},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def words(count: int, start: int = 0) -> str:
    """Text of `count` words that the tokenizer knows."""
    return " ".join(f"w{((start + i) * (start + i) + i // 7) % (VOCABULARY - 2)}" for i in range(count))


def save_tokenizer(folder: Path) -> None:
    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(VOCABULARY - 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )


@cache
def _made(model_type: str, dtype: torch.dtype, settings: tuple[tuple[str, Any], ...]) -> Path:
    folder = Path(mkdtemp(prefix="quantcli-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(_SHAPES.get(model_type, _DECODER) | dict(settings)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases and norms that matter
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def checkpoint(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Makes `folder` a tiny checkpoint; the same arguments give the same bytes."""
    shutil.copytree(_made(model_type, dtype, tuple(sorted(settings.items()))), folder)
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Lets `change` alter the tensors of model.safetensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob(pattern))
        if p.is_file()
    }


class Warnings(Silent):
    """Keeps what a run warned of."""

    def __init__(self):
        self.said = []

    def warn(self, message):
        self.said.append(message)
