import json
import sys

import pytest

from quantcli.data.builtin import builtin_texts
from quantcli.data.sources import decode_escapes, hub_texts, read_texts
from quantcli.errors import InputError, UsageError

ROWS = [{"text": "one", "title": "A", "number": 1}, {"text": "two\nlines", "title": "B", "number": None}]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_jsonl(jsonl):
    assert read_texts(jsonl) == ["one", "two\nlines"]
    assert read_texts(jsonl, text_field="title") == ["A", "B"]
    assert read_texts(jsonl, text_field="number") == ["1"]


def test_template_escapes_and_fields(jsonl):
    assert read_texts(jsonl, text_template=r"# {title}\n{text}{{x}}") == ["# A\none{x}", "# B\ntwo\nlines{x}"]
    assert decode_escapes(r"a\nb\tc\\nd\q") == "a\nb\tc\\nd\\q"


@pytest.mark.parametrize("template", ["no field", "{}", "{text", "{text!r}", "{text:>9}"])
def test_malformed_templates_are_refused(jsonl, template):
    with pytest.raises(UsageError, match="text template"):
        read_texts(jsonl, text_template=template)


def test_template_names_the_missing_field(jsonl):
    with pytest.raises(InputError, match=r"rows.jsonl: row 1: no field 'titel', did you mean 'title'\?"):
        read_texts(jsonl, text_template="{titel}")


def test_template_fields_are_never_evaluated(jsonl):
    with pytest.raises(InputError, match=r"no field 'text\.__class__'"):
        read_texts(jsonl, text_template="{text.__class__}")


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\n\nzwölf\n".encode())
    assert read_texts(path) == ["one\n\nzwölf"]
    with pytest.raises(UsageError, match="plain text"):
        read_texts(path, text_field="text")


def test_csv_with_quotes_newlines_and_long_cells(tmp_path):
    path = tmp_path / "a.csv"
    long = "x" * 200_000
    path.write_text(f'id,text\n1,"a ""b""\nc\u2028d"\n2,{long}\n')
    assert read_texts(path) == ['a "b"\nc\u2028d', long]


@pytest.mark.parametrize("line", ["1", "1,a,b"])
def test_csv_with_ragged_rows_is_refused(tmp_path, line):
    path = tmp_path / "a.csv"
    path.write_text(f"id,text\n1,a\n{line}\n")
    with pytest.raises(InputError, match="line 3 has another number of cells"):
        read_texts(path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_texts(path) == ["one", "two\nlines"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="not a readable parquet file"):
        read_texts(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError) as caught:
        read_texts(path)
    assert caught.value.hint == "pip install 'quantcli[parquet]'"


def test_hub_without_datasets_or_network_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the package datasets") as caught:
        hub_texts("nobody/nothing")
    assert "--data FILE" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "holds no text"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"a\0b", "binary file"),
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not valid JSON"),
        ("a.jsonl", b'["a"]\n', "line 1 holds a JSON list"),
        ("a.jsonl", b'{"body": "a"}\n', "row 1: no field 'text', known: body"),
        ("a.jsonl", b'{"text": {"a": 1}}\n', "field 'text' holds a dict"),
        ("a.csv", b'text\n"a', "not valid CSV after line 1"),
        ("a.docx", b"x", r"unknown kind of data file '.docx'"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(InputError, match="is a folder"):
        read_texts(tmp_path)


def test_chat_rows(tmp_path):
    class Chat:
        chat_template = "x"

        def apply_chat_template(self, conversation, *, tokenize):
            return "|".join(m["content"] for m in conversation)

    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    assert read_texts(path, chat=Chat()) == ["hi|ho"]
    path.write_text('{"messages": "hi"}\n')
    with pytest.raises(InputError, match="not a list of messages"):
        read_texts(path, chat=Chat())
    path.write_text('{"text": "hi"}\n')
    with pytest.raises(InputError, match="no field 'messages'"):
        read_texts(path, chat=Chat())
    Chat.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        read_texts(path, chat=Chat())


def test_builtin_text_is_english_and_enough():
    texts = builtin_texts()
    assert sum(map(len, texts)) > 300_000
    assert any('The "if" statement' in text for text in texts)
