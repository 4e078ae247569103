"""The text of an evaluation, as windows of tokens that both models read alike."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from quantcli.data import builtin, sources
from quantcli.errors import InputError, first_line

__all__ = ["open_tokenizer", "read_windows", "require_same_tokens"]

# Characters that show whether two tokenizers are one; all of a long corpus would cost seconds and tell no more.
_COMPARED_CHARACTERS = 200_000


def open_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer that a model folder brings along.

    Raises:
        InputError: there is none that transformers can open.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizers raises bare exceptions
        reason = first_line(error)
        raise InputError(
            f"{folder} has no tokenizer that can be opened: {reason}",
            hint="copy tokenizer.json and tokenizer_config.json of the original into it",
        ) from error


def read_windows(
    tokenizer: Any, data: str | None, text_field: str | None, num_samples: int, seq_len: int
) -> tuple[Tensor, list[str], str]:
    """Reads and cuts the text.

    Args:
        tokenizer: A transformers tokenizer.
        data: File, or None (or `builtin`) for the text that every Python carries.
        text_field: Field of structured files.
        num_samples: Windows.
        seq_len: Tokens per window.

    Returns:
        Tokens [windows, seq_len] int64, the texts, and where they came from in words.
    """
    if data is None or data == "builtin":
        texts, source = builtin.builtin_texts(), "Python's documentation (pydoc_data.topics)"
    else:
        texts, source = sources.read_texts(Path(data), text_field, None), str(data)
    return sources.evaluation_windows(tokenizer, texts, num_samples, seq_len), texts, source


def require_same_tokens(ours: Any, theirs: Any, texts: list[str], model: Path, reference: Path) -> None:
    """Refuses models that cut text differently: their distributions cannot be compared token by token.

    Raises:
        InputError: the tokenizers differ on these texts.
    """
    left = _COMPARED_CHARACTERS
    for text in texts:
        part = text[:left]
        if _token_ids(ours, part) != _token_ids(theirs, part):
            raise InputError(
                f"{model} and {reference} cut the same text into different tokens, they cannot be compared",
                hint="give the model that it was made from as --reference",
            )
        left -= len(part)
        if left <= 0:
            return


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    # not verbose: a text longer than the model's context is no mistake here
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
