"""The rows of tokens that statistics are gathered on, from whichever source the options name."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.data import sampling
from quantcli.data.builtin import builtin_texts
from quantcli.data.sources import hub_texts, read_texts
from quantcli.data.windows import bos_prefix, cut_rows, joined_tokens
from quantcli.errors import InputError, first_line
from quantcli.models.load import load
from quantcli.options import BUILTIN, SELF, CalibrationOptions
from quantcli.progress import Progress

__all__ = ["CalibrationRows", "calibration_rows", "load_tokenizer"]

# text beyond this many characters per wanted token is drawn from, not read whole
_CHARACTERS_PER_TOKEN = 32
# length of a drawn stretch in characters per token of a row: about four rows
_PIECE = 16


@dataclass(frozen=True)
class CalibrationRows:
    """Calibration text as the model sees it."""

    tokens: Tensor
    """[rows, seq_len] int64."""
    source: str
    """Where it comes from, in words."""
    shortfall: int
    """Rows that were asked for and that the text does not give."""
    seconds: float
    """What it took."""


def calibration_rows(
    options: CalibrationOptions,
    folder: Path,
    *,
    source: str | None = None,
    model_digest: str,
    progress: Progress,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    flag: str = "--num-samples ",
) -> CalibrationRows:
    """Reads or writes calibration text and cuts it into rows; the same for the same seed.

    Args:
        options: What the user asked for.
        folder: Model folder.
        source: `self` or `builtin` where the options leave the choice open; default: self.
        model_digest: Fingerprint of the model, which keys the cache of text that it wrote.
        progress: Told of what is read, written and missing.
        device: Where a model that writes its own text runs; default: as `quantcli.load`.
        trust_remote_code: Run tokenizer and model code that the folder brings along.
        flag: By which the number of rows was asked for, where the text has fewer.

    Raises:
        InputError: data that cannot be read or holds less than one row.
    """
    begun = time.perf_counter()
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if (options.data or (None if options.data_name else source or SELF)) == SELF:
        key = sampling.SamplingKey(model_digest, options.num_samples, options.seq_len, options.seed)

        def open_sampler() -> sampling.Sampler:
            model = load(folder, device=device, trust_remote_code=trust_remote_code)
            return sampling.open_sampler(model, tokenizer)

        tokens = sampling.cached_sample(key, open_sampler, progress, whole=options.data == SELF)
        if tokens is not None:
            return CalibrationRows(tokens, "text that the model wrote itself", 0, time.perf_counter() - begun)
        progress.warn(
            "the model keeps nothing of earlier tokens, its own text would take too long: Python's documentation is "
            "used instead; --data self asks for it all the same, --data FILE gives better text"
        )
    texts, words = _texts(options, tokenizer)
    generator = torch.Generator().manual_seed(options.seed)
    wanted = options.num_samples * options.seq_len
    drawn = _drawn(texts, _CHARACTERS_PER_TOKEN * wanted, _PIECE * options.seq_len, generator)
    line = joined_tokens(tokenizer, drawn)
    rows = cut_rows(line, options.num_samples, options.seq_len, bos_prefix(tokenizer), generator)
    count = rows.shape[0]
    if count == 0:
        raise InputError(
            f"{words} holds {line.numel()} tokens, fewer than one row of {options.seq_len}",
            hint=f"give more text, or --seq-len {max(line.numel() // 2, 1)}",
        )
    shortfall = options.num_samples - count
    if shortfall:
        progress.warn(
            f"{words} gives {count} rows of {options.seq_len} tokens, {options.num_samples} were asked for: "
            f"add text, or choose {flag}{count}"
        )
    return CalibrationRows(rows, words, shortfall, time.perf_counter() - begun)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise bare exceptions for files that they cannot read
        reason = first_line(error)
        raise InputError(
            f"{folder} has no tokenizer that can be read: {reason}", hint="copy the tokenizer's files into the folder"
        ) from error


def _texts(options: CalibrationOptions, tokenizer: Any) -> tuple[list[str], str]:
    """The documents, and where they come from in words."""
    chat = tokenizer if options.use_chat_template else None
    if options.data_name is not None:
        texts = hub_texts(options.data_name, options.data_split, options.text_field, options.text_template, chat)
        return texts, f"data set {options.data_name} ({options.data_split})"
    if options.data is None or options.data == BUILTIN:
        return builtin_texts(), "Python's own documentation"
    return read_texts(options.data, options.text_field, options.text_template, chat), options.data


def _drawn(texts: Sequence[str], budget: int, piece: int, generator: torch.Generator) -> Sequence[str]:
    """All documents where they have at most `budget` characters, else random stretches of `piece` that add up to it."""
    if sum(len(text) for text in texts) <= budget:
        return texts
    pieces = [(text, start) for text in texts for start in range(0, len(text), piece)]
    drawn: list[str] = []
    length = 0
    for index in torch.randperm(len(pieces), generator=generator).tolist():
        text, start = pieces[index]
        drawn.append(text[start : start + piece])
        length += len(drawn[-1])
        if length >= budget:
            break
    return drawn
