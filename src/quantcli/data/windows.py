"""Rows of tokens cut out of text: spread evenly over all of it, never overlapping."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError

__all__ = ["bos_prefix", "cut_rows", "evaluation_windows", "joined_tokens"]

_CHUNK = 64  # documents that go through the tokenizer together


def bos_prefix(tokenizer: Any) -> list[int]:
    """The start token, where the tokenizer puts one before every text; models that expect it fail without."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []


def joined_tokens(tokenizer: Any, texts: Sequence[str], limit: int | None = None) -> Tensor:
    """All documents as one line of tokens [T] int64, an end token between two.

    Args:
        tokenizer: A transformers tokenizer.
        texts: Documents.
        limit: Stop once this many tokens are there.
    """
    separator = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ids: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        for document in tokenizer(list(texts[start : start + _CHUNK]), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]:
            ids.extend(document)
            ids.extend(separator)
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[: -len(separator)] if separator else ids, dtype=torch.int64)


def cut_rows(line: Tensor, num: int, seq_len: int, prefix: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Up to `num` rows [R, seq_len] int64 of a line of tokens [T], each starting with `prefix`.

    The line is cut into as many disjoint rows as it holds. Without a generator those taken are evenly spaced, in order;
    with one they are drawn at random, one from each of `num` equal stretches, and shuffled.
    """
    body = seq_len - len(prefix)
    if body < 1:
        raise InputError(
            f"rows of {seq_len} tokens leave no room after the start token", hint="give a larger --seq-len"
        )
    available = line.numel() // body
    count = min(num, available)
    edges = torch.arange(count + 1, dtype=torch.int64) * available // max(count, 1)
    if generator is None:
        # the middle of each stretch: neither the first lines of the text nor the last stand for all of it
        chosen = (edges[:-1] + edges[1:]) // 2
    else:
        widths = edges.diff()
        offsets = (torch.rand(count, generator=generator, dtype=torch.float64) * widths).long()
        chosen = (edges[:-1] + offsets)[torch.randperm(count, generator=generator)]
    rows = line[: available * body].view(available, body)[chosen]
    head = torch.tensor(list(prefix), dtype=torch.int64).expand(count, -1)
    return torch.cat([head, rows], dim=1)


def evaluation_windows(tokenizer: Any, texts: Sequence[str], num: int, seq_len: int) -> Tensor:
    """Evenly spaced, disjoint windows of text, [num, seq_len] int64, fewer where the text holds fewer.

    Raises:
        InputError: the text holds less than one window.
    """
    line = joined_tokens(tokenizer, texts)
    windows = cut_rows(line, num, seq_len, bos_prefix(tokenizer), None)
    if windows.shape[0] == 0:
        raise InputError(
            f"the text holds {line.numel()} tokens, fewer than one window of {seq_len}",
            hint=f"give more text, or --seq-len {max(line.numel() // 2, 1)}",
        )
    return windows
