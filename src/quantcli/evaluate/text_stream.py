"""Tokens as text, as they come."""

from typing import Any

__all__ = ["TextStream"]

_UNFINISHED = "\ufffd"  # what a decoder shows for bytes that do not make a character yet
_CONTEXT = 4  # tokens; a character has at most four bytes


class TextStream:
    """Decodes tokens one after the other; a character of several tokens comes with its last."""

    def __init__(self, tokenizer: Any, prompt: list[int]):
        """Starts behind a prompt: some decoders drop the space before the first token that they see."""
        self._tokenizer = tokenizer
        self._tokens = prompt[-_CONTEXT:]
        self._shown = self._decode()

    def add(self, token: int) -> str:
        """The text that this token completes; empty where a character is not finished."""
        self._tokens.append(token)
        text = self._decode()
        return "" if text.endswith(_UNFINISHED) else self._take(text)

    def end(self) -> str:
        """What is left, unfinished characters included."""
        return self._take(self._decode())

    def _take(self, text: str) -> str:
        new = text[len(self._shown) :]
        # a few tokens of context suffice: decoding everything each time would take time with the square of its length
        self._tokens = self._tokens[-_CONTEXT:]
        self._shown = self._decode()
        return new

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
