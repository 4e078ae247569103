"""What stands beside a captured graph: tokenizer, chat template, generation config; and the tokens it is tried on."""

import pydoc_data.topics
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from quantcli.errors import InputError, first_line
from quantcli.graphs.model.genai_config import read_genai_config

__all__ = ["context_length", "copy_tokenizer", "probe_tokens", "read_tokenizer"]

_PROBE_TOKENS = 400
_PROMPT = "The capital of France is"
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def read_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer; a GenAI folder without one cannot generate.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if not any(
        (folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise InputError(
            f"{folder} has no tokenizer, which a GenAI folder needs", hint="copy tokenizer.json and its config there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on damaged files
        reason = first_line(error)
        raise InputError(f"the tokenizer of {folder} cannot be read: {reason}") from error


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what the exporter did not write itself."""
    for name in _COMPANIONS:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)


def probe_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """A few hundred tokens of English that every Python carries, and a prompt."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in ("strings", "exceptions", "naming", "classes") if name in topics)
    tokens = [int(t) for t in tokenizer(text[:12000])["input_ids"]][:_PROBE_TOKENS]
    prompt = [int(t) for t in tokenizer(_PROMPT)["input_ids"]] or tokens[:4]
    if len(tokens) < 2:
        raise InputError("the tokenizer makes no tokens of English text")
    return tokens, prompt


def context_length(folder: Path) -> int:
    """Positions that a GenAI folder has, as the exporter has just written it."""
    length = read_genai_config(folder).model.context_length
    assert length is not None
    return length
