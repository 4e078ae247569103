"""Rows of a data set as examples to train on: tokens, and from which of them on the loss counts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.data.sources import (
    Row,
    hub_rows,
    parse_template,
    read_rows,
    row_messages,
    row_renderer,
    row_text,
)
from quantcli.data.windows import bos_prefix
from quantcli.errors import InputError, UsageError
from quantcli.options import ExampleOptions
from quantcli.progress import Progress

__all__ = ["IGNORED", "Example", "ExampleReader", "ExampleSets", "collate", "local_files", "pack", "read_examples"]

IGNORED = -100
"""Label of a token that the loss does not count."""
_Pair = tuple[str, str]
_SHARE, _MOST = 0.1, 256  # what is held out where nothing is said


@dataclass(frozen=True)
class Example:
    """One text."""

    tokens: list[int]
    """Its tokens, start and end token included."""
    counted_from: int
    """The first token that the loss counts."""
    answer: tuple[int, int]
    """Where the completion lies, without an end token that was added; empty where the text has none."""
    texts: tuple[str, str] = ("", "")
    """Prompt and completion as they were read; empty where the text has no completion."""

    @property
    def labels(self) -> list[int]:
        """The tokens, those not counted replaced; the first is never predicted."""
        return [IGNORED] * self.counted_from + self.tokens[self.counted_from :]


@dataclass(frozen=True)
class ExampleSets:
    """What is trained on, and what the eval loss is measured on."""

    train: list[Example]
    eval: list[Example]
    source: str
    """Where they come from, in words."""


def read_examples(options: ExampleOptions, tokenizer: Any, seed: int, progress: Progress) -> ExampleSets:
    """Reads, renders, tokenizes and splits; the same for the same seed.

    Raises:
        InputError: data that cannot be read, lacks a field, or holds too little.
        UsageError: a template that is none, or an eval split that cannot be.
    """
    reader = ExampleReader(options, tokenizer)
    source = ", ".join(local_files(options)) or f"data set {options.data_name} ({options.data_split})"
    found = reader.read(islice(_rows(options), options.max_samples))
    reader.report(source, progress)
    split = options.eval_split
    wanted = _SHARE if split is None else _number(split)
    if split is not None and wanted is None:
        judge = ExampleReader(options, tokenizer)
        held_out = judge.read(islice(_rows_of(options, split), options.max_samples))
        judge.report(split, progress, short=False)  # fewer rows than to train on are no shortfall
        if not found or not held_out:
            raise InputError(f"{source if not found else split} holds no text to train on or to evaluate")
        return ExampleSets(found, held_out, source)
    if not found:
        raise InputError(f"{source} holds no text to train on", hint="give another file, or other fields")
    assert wanted is not None
    count = max(round(wanted * len(found)) if wanted < 1 else int(wanted), 1)
    count = min(count, _MOST) if split is None else count
    if count >= len(found):
        raise InputError(
            f"{source} gives {len(found)} examples, --eval-split {split or _SHARE} leaves none to train on",
            hint="give more data, a smaller --eval-split, or a shorter --seq-len for one long text",
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:count])
    train = [example for i, example in enumerate(found) if i not in held]
    return ExampleSets(train, [found[i] for i in sorted(held)], source)


def local_files(options: ExampleOptions) -> tuple[str, ...]:
    """The files that are trained on; none where the data come from the hub."""
    named = options.data_name
    return (named,) if named is not None and Path(named).is_file() else options.data_files


def pack(examples: Sequence[Example], seq_len: int) -> list[list[Example]]:
    """Rows of at most `seq_len` tokens, filled in order; a row holds one example or more."""
    rows: list[list[Example]] = []
    room = 0
    for example in examples:
        if len(example.tokens) > room:
            rows.append([])
            room = seq_len
        rows[-1].append(example)
        room -= len(example.tokens)
    return rows


def collate(rows: Sequence[Sequence[Example]], pad: int) -> dict[str, Tensor]:
    """A batch [B, T] int64 of rows that hold one example or several.

    Rows of one are padded behind a mask. Rows of several carry position_ids that begin anew with each example, by which
    attention tells them apart, and no mask; the padding behind is a text of its own that no loss counts.
    """
    packed = any(len(row) > 1 for row in rows)
    width = max(sum(len(e.tokens) for e in row) for row in rows)
    made: dict[str, list[list[int]]] = {
        "input_ids": [],
        "labels": [],
        "position_ids" if packed else "attention_mask": [],
    }
    for row in rows:
        tokens = [token for e in row for token in e.tokens]
        # the first token of an example would else be predicted from the end of the one before
        labels = [label for e in row for label in (IGNORED, *e.labels[1:])]
        empty = width - len(tokens)
        made["input_ids"].append(tokens + [pad] * empty)
        made["labels"].append(labels + [IGNORED] * empty)
        if packed:
            made["position_ids"].append([i for e in row for i in range(len(e.tokens))] + list(range(empty)))
        else:
            made["attention_mask"].append([1] * len(tokens) + [0] * empty)
    return {name: torch.tensor(values) for name, values in made.items()}


class ExampleReader:
    """Turns rows into examples and counts what it had to leave out."""

    def __init__(self, options: ExampleOptions, tokenizer: Any):
        self.options, self.tokenizer = options, tokenizer
        self.render, self.has_answers = _pair_renderer(options, tokenizer)
        self.prefix = [] if options.use_chat_template else bos_prefix(tokenizer)
        self.end = None if options.use_chat_template else tokenizer.eos_token_id
        self.rows = self.empty = self.cut = self.lost = self.merged = 0

    def read(self, rows: Iterable[tuple[str, Row]]) -> list[Example]:
        """The examples of rows, each with where it stands."""
        examples: list[Example] = []
        for where, row in rows:
            self.rows += 1
            try:
                prompt, rest = self.render(row)
            except InputError as error:
                raise InputError(f"{where}: {error.message}", hint=error.hint) from error
            if not rest or rest.isspace():
                self.empty += 1
                continue
            examples += self.pair(prompt, rest) if self.has_answers else self._pieces(rest)
        return examples

    def report(self, source: str, progress: Progress, *, short: bool = True) -> None:
        """Says what is missing and why; `short`: fewer rows than asked for, too."""
        seq_len, of = self.options.seq_len, f"of {self.rows} rows"
        if short and self.options.max_samples is not None and self.rows < self.options.max_samples:
            progress.warn(f"{source} holds {self.rows} rows, --max-samples asked for {self.options.max_samples}")
        if self.empty:
            progress.warn(f"{source}: {self.empty} {of} hold nothing and were left out")
        if self.cut:
            progress.warn(f"{source}: {self.cut} {of} were cut at {seq_len} tokens: --seq-len takes more")
        if self.lost:
            progress.warn(
                f"{source}: {self.lost} {of} have a prompt of {seq_len} tokens or more and were left out: "
                "--seq-len takes more"
            )
        if self.merged:
            progress.warn(
                f"{source}: in {self.merged} {of} the last token before the completion merges with it: a prompt "
                "that ends there is cut differently; move the blank before the template's last field into the data"
            )

    def pair(self, prompt: str, rest: str) -> list[Example]:
        """A prompt and its completion; nothing where the prompt leaves no room."""
        before, tokens = self._tokens(prompt), self._tokens(prompt + rest)
        start = next((i for i, (a, b) in enumerate(zip(before, tokens, strict=False)) if a != b), len(before))
        self.merged += start < len(before)
        answer_end = len(tokens)
        if self.end is not None and tokens[-1] != self.end:
            tokens = [*tokens, self.end]
        if len(tokens) > self.options.seq_len:
            if start >= self.options.seq_len:
                self.lost += 1
                return []
            self.cut += 1
            tokens = tokens[: self.options.seq_len]
        counted = start if self.options.completion_only else 0
        return [Example(tokens, counted, (start, min(answer_end, len(tokens))), (prompt, rest))]

    def _pieces(self, text: str) -> list[Example]:
        """A long text gives several examples, of which nothing is lost."""
        body = self._tokens(text)[len(self.prefix) :]
        if self.end is not None and body[-1:] != [self.end]:
            body = [*body, self.end]
        step = self.options.seq_len - len(self.prefix)
        pieces = [[*self.prefix, *body[i : i + step]] for i in range(0, len(body), step)]
        return [Example(tokens, 0, (0, 0)) for tokens in pieces if len(tokens) > 1]

    def _tokens(self, text: str) -> list[int]:
        # not verbose: a text longer than the model's context is no mistake here
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if ids[: len(self.prefix)] == self.prefix else [*self.prefix, *ids]


def _pair_renderer(options: ExampleOptions, tokenizer: Any) -> tuple[Callable[[Row], _Pair], bool]:
    """From a row to prompt and completion, and whether there is a completion; else the prompt is empty."""
    if options.text_template is not None:
        return _template_pairs(options.text_template, options.completion_only), True
    if options.use_chat_template:
        row_renderer(chat=tokenizer)  # refuses a tokenizer without template
        return lambda row: _chat_pair(row, tokenizer), True
    render = row_renderer(options.text_field)
    return lambda row: ("", render(row).strip()), False


def _template_pairs(template: str, completion_only: bool) -> Callable[[Row], _Pair]:
    pieces = parse_template(template)
    last = max(i for i, (_, field) in enumerate(pieces) if field is not None)
    if completion_only and last == 0 and not pieces[0][0]:
        raise UsageError(
            f"text template {template!r} has nothing before its last field, --completion-only would have no effect",
            hint="as in --text-template 'Q: {question}\\nA: {answer}'",
        )

    def render(row: Row) -> _Pair:
        texts = ["" if f is None else row_text(row, f, "correct --text-template") for _, f in pieces]
        prompt = "".join(literal + text for (literal, _), text in zip(pieces[:last], texts, strict=False))
        if not texts[last].strip():
            return "", ""  # an answer that is missing is not to be learnt
        return prompt + pieces[last][0], texts[last] + "".join(literal for literal, _ in pieces[last + 1 :])

    return render


def _chat_pair(row: Row, tokenizer: Any) -> _Pair:
    messages = row_messages(row)
    if not messages:
        return "", ""
    try:
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a chat template is a program of the model's author
        raise InputError(f"the chat template failed: {error}") from error
    if not whole.startswith(prompt):
        raise InputError(
            "the chat template renders the last message differently as an answer, prompt and completion cannot be told",
            hint="use --text-template",
        )
    return prompt, whole[len(prompt) :]


def _rows(options: ExampleOptions) -> Iterator[tuple[str, Row]]:
    """Every row with where it stands."""
    for name in local_files(options) or (options.data_split,):
        yield from _rows_of(options, name)


def _rows_of(options: ExampleOptions, name: str) -> Iterator[tuple[str, Row]]:
    """The rows of a file, or of a split of the hub data set."""
    from_hub = options.data_name is not None and not Path(name).is_file()
    rows = iter(hub_rows(str(options.data_name), name)) if from_hub else read_rows(name)
    where = f"{options.data_name} ({name})" if from_hub else name
    for number, row in enumerate(rows, 1):
        yield f"{where}: row {number}", row


def _number(eval_split: str) -> float | None:
    """A share or a number of rows; None for a name."""
    try:
        value = float(eval_split)
    except ValueError:
        return None
    if not value > 0 or (value >= 1 and value != int(value)):
        raise UsageError(
            f"--eval-split must be a share between 0 and 1, a whole number of rows or a name, got {eval_split}"
        )
    return value
