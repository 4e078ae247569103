"""Text out of files and hub data sets: one string per document, or one clear error."""

import csv
import io
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from quantcli.data.windows import evaluation_windows
from quantcli.errors import InputError, UsageError, first_line, nearest

__all__ = [
    "ChatTokenizer",
    "Renderer",
    "Row",
    "decode_escapes",
    "evaluation_windows",
    "hub_rows",
    "hub_texts",
    "parse_template",
    "read_rows",
    "read_texts",
    "row_messages",
    "row_renderer",
    "row_text",
]

Row = Mapping[str, Any]
Renderer = Callable[[Row], str]
TEXT_FIELD = "text"
SUFFIXES = {
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
# a cell of a csv file may hold a whole document; Python's own limit is 131072 characters
_MAX_CELL = 1 << 30


class ChatTokenizer(Protocol):
    """What is asked of a tokenizer that renders messages."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool = False) -> Any:
        """Messages as text."""
        ...


def read_texts(
    path: Path | str,
    text_field: str | None = None,
    text_template: str | None = None,
    chat: ChatTokenizer | None = None,
) -> list[str]:
    """The documents of a txt, jsonl, csv or parquet file, empty ones left out.

    A txt file is one document. Other files hold one document per row: the field
    `text_field` (default `text`), several fields put into `text_template`, or the field `messages` rendered by the
    chat template of the tokenizer `chat`.

    Raises:
        InputError: the file is missing, empty, not text, damaged, or lacks the field.
        UsageError: a field or template for a txt file, or a template that is none.
    """
    path = Path(path)
    kind = _kind_of(path)
    if kind == "txt":
        if text_field is not None or text_template is not None or chat is not None:
            raise UsageError(
                f"{path} is plain text and has no fields", hint="leave out the field, template or chat flag"
            )
        texts = [_decoded(path)]
    else:
        render = row_renderer(text_field, text_template, chat)
        texts = [_render(render, row, f"{path}: row {number}") for number, row in enumerate(_READERS[kind](path), 1)]
    texts = [text.strip() for text in texts if text and not text.isspace()]
    if not texts:
        raise InputError(f"data file {path} holds no text")
    return texts


def read_rows(path: Path | str) -> Iterator[Row]:
    """The rows of a jsonl, csv, tsv or parquet file; a txt file is one row whose field is `text`.

    Raises:
        InputError: the file is missing, empty, not text, or damaged.
    """
    path = Path(path)
    kind = _kind_of(path)
    return iter([{TEXT_FIELD: _decoded(path)}]) if kind == "txt" else _READERS[kind](path)


def hub_texts(
    name: str,
    split: str = "train",
    text_field: str | None = None,
    text_template: str | None = None,
    chat: ChatTokenizer | None = None,
    limit: int = 20_000,
) -> list[str]:
    """The first `limit` documents of a data set on the Hugging Face hub or in its cache.

    Raises:
        InputError: the package `datasets` is missing, the data set cannot be reached, or it lacks the field.
    """
    rows = hub_rows(name, split)
    render = row_renderer(text_field, text_template, chat)
    count = min(limit, len(rows))
    texts = [_render(render, rows[i], f"{name}: row {i + 1}") for i in range(count)]
    texts = [text.strip() for text in texts if text and not text.isspace()]
    if not texts:
        raise InputError(f"data set {name!r} (split {split!r}) holds no text", hint="give local text with --data FILE")
    return texts


def hub_rows(name: str, split: str) -> Sequence[Row]:
    """A data set on the Hugging Face hub or in its cache.

    Raises:
        InputError: the package `datasets` is missing, or the data set cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"data set {name!r} needs the package datasets", hint="pip install 'quantcli[hub]', or give --data FILE"
        ) from error
    try:
        rows: Sequence[Row] = datasets.load_dataset(name, split=split, streaming=False)
    except Exception as error:  # the package raises whatever its file systems and parsers raise
        reason = first_line(error)
        raise InputError(
            f"data set {name!r} (split {split!r}) cannot be loaded: {reason}", hint="give local text with --data FILE"
        ) from error
    return rows


def row_renderer(
    text_field: str | None = None, text_template: str | None = None, chat: ChatTokenizer | None = None
) -> Renderer:
    """How a row becomes text. The function it returns raises `InputError` for a row that lacks a field.

    Raises:
        UsageError: the template is malformed or names no field.
        InputError: the tokenizer has no chat template.
    """
    if text_template is not None:
        return _template_renderer(text_template)
    if chat is not None:
        if not chat.chat_template:
            raise InputError("the model has no chat template", hint="use --text-field or --text-template")
        tokenizer = chat
        return lambda row: str(tokenizer.apply_chat_template(row_messages(row), tokenize=False))
    name = text_field or TEXT_FIELD

    def render(row: Row) -> str:
        return row_text(row, name, "name another with --text-field")

    return render


def decode_escapes(template: str) -> str:
    r"""Reads `\n`, `\t` and `\\` as a shell user means them; everything else stays as written."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], template)


def parse_template(text_template: str) -> list[tuple[str, str | None]]:
    """The pieces of a template, escapes decoded: plain text and the field after it; None after the last.

    Raises:
        UsageError: the template is malformed or names no field.
    """
    example = "as in --text-template 'Q: {question}\\nA: {answer}'"
    try:
        parts = list(string.Formatter().parse(decode_escapes(text_template)))
    except ValueError as error:
        raise UsageError(f"text template {text_template!r} is malformed: {error}", hint=example) from error
    fields = [field for _, field, _, _ in parts if field is not None]
    if not fields:
        raise UsageError(f"text template {text_template!r} names no field", hint=example)
    if not all(fields) or any(spec or conversion for _, _, spec, conversion in parts):
        raise UsageError(f"text template {text_template!r}: a field is a plain name in braces", hint=example)
    return [(literal, field) for literal, field, _, _ in parts]


def _template_renderer(text_template: str) -> Renderer:
    pieces = parse_template(text_template)

    def render(row: Row) -> str:
        # fields are looked up, never evaluated: "{a.b}" is the field called "a.b"
        return "".join(
            literal + ("" if field is None else row_text(row, field, "correct --text-template"))
            for literal, field in pieces
        )

    return render


def row_text(row: Row, name: str, hint: str) -> str:
    """A field as text; an empty one is "".

    Raises:
        InputError: the row lacks it, or it holds no text; `hint` says what to do.
    """
    if name not in row:
        raise InputError(f"no field {name!r}, {nearest(name, (str(k) for k in row))}", hint=hint)
    value = row[name]
    if value is None:
        return ""
    if isinstance(value, (dict, list, bytes)):
        raise InputError(f"field {name!r} holds a {type(value).__name__}, expected text", hint=hint)
    return str(value)


def row_messages(row: Row) -> Any:
    """The field `messages` of a row.

    Raises:
        InputError: it is missing or no list of messages.
    """
    hint = 'a row is {"messages": [{"role": "user", "content": "..."}, ...]}'
    if "messages" not in row:
        raise InputError(f"no field 'messages', {nearest('messages', (str(k) for k in row))}", hint=hint)
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise InputError("field 'messages' is not a list of messages with role and content", hint=hint)
    return messages


def _render(render: Renderer, row: Row, where: str) -> str:
    try:
        return render(row)
    except InputError as error:
        raise InputError(f"{where}: {error.message}", hint=error.hint) from error
    except Exception as error:  # a chat template is a program of the model's author
        raise InputError(f"{where}: the chat template failed: {error}") from error


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start})", hint=f"convert it: iconv -t utf-8 {path} > new.txt"
        ) from error
    if "\0" in text:
        raise InputError(f"{path} is a binary file, expected text")
    return text


def _jsonl_rows(path: Path) -> Iterator[Row]:
    # split at \n alone: splitlines would also cut at the Unicode separators that JSON strings may hold
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: line {number} is not valid JSON: {error}", hint="write one JSON object per line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{path}: line {number} holds a JSON {type(row).__name__}, expected an object",
                hint="write one JSON object per line",
            )
        yield row


def _csv_rows(path: Path, delimiter: str = ",") -> Iterator[Row]:
    before = csv.field_size_limit(_MAX_CELL)
    try:
        reader = csv.DictReader(io.StringIO(_decoded(path), newline=""), strict=True, delimiter=delimiter)
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}: line {reader.line_num} has another number of cells than the header")
            yield row
    except csv.Error as error:
        raise InputError(f"{path}: not valid CSV after line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path} needs the package pyarrow", hint="pip install 'quantcli[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {first_line(error)}") from error


def _kind_of(path: Path) -> str:
    """What a data file's name says it is, once it is known to be there and not empty."""
    if not path.exists():
        raise InputError(f"data file {path} does not exist")
    if not path.is_file():
        raise InputError(f"{path} is a folder, expected a data file ({', '.join(sorted(SUFFIXES))})")
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise InputError(
            f"{path}: unknown kind of data file {path.suffix!r}, allowed: {', '.join(sorted(SUFFIXES))}",
            hint="rename it, or write one JSON object per line into a .jsonl file",
        )
    if path.stat().st_size == 0:
        raise InputError(f"data file {path} is empty")
    return kind


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": _jsonl_rows,
    "csv": _csv_rows,
    "tsv": partial(_csv_rows, delimiter="\t"),
    "parquet": _parquet_rows,
}
