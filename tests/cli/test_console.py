"""Progress goes to stderr, results to stdout; pipes get plain lines, terminals get bars."""

import io
import json
import os
import pty
import subprocess
import sys
import textwrap

import pytest

from quantcli.cli import console as console_module
from quantcli.cli.command import Talk
from quantcli.cli.console import Console, human_duration, human_size


def work(console, steps=3):
    console.plan("Plan", [("model", "M [x]"), ("bits", "4")])
    console.note("a [bold]note[/bold]")
    console.warn("few texts")
    with console.track("blocks", steps, start=1) as task:
        for i in range(1, steps):
            task.advance(1, f"loss {i}")


def test_a_pipe_gets_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(console_module, "SECONDS_BETWEEN_LINES", 0.0)
    work(Console(Talk()))
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    said = err.splitlines()
    assert said[:5] == ["Plan", "  model  M [x]", "  bits   4", "a [bold]note[/bold]", "warning: few texts"]
    assert said[5].startswith("blocks: 2/3, ")
    assert said[5].endswith(" left, loss 1")
    assert said[6].startswith("blocks: 3/3 in ")
    assert len(said) == 7


def test_lines_come_seconds_apart(capsys):
    with Console(Talk()).track("blocks", 1000) as task:
        for _ in range(1000):
            task.advance()
    assert [line.split(":")[1].split()[0].rstrip(",") for line in capsys.readouterr().err.splitlines()] == [
        "1/1000",
        "1000/1000",
    ]


def test_unfinished_work_does_not_claim_to_be_done(capsys):
    with pytest.raises(RuntimeError), Console(Talk()).track("blocks", 4) as task:
        task.advance()
        raise RuntimeError
    assert " in " not in capsys.readouterr().err


def test_quiet_leaves_warnings_and_results(capsys):
    console = Console(Talk(quiet=True))
    work(console)
    console.text("the result")
    out, err = capsys.readouterr()
    assert err == "warning: few texts\n"
    assert out == "the result\n"


def test_tables_in_pipes_have_no_colour_no_markup_and_no_trailing_blanks(capsys):
    Console(Talk()).table(("layers", "bits"), [("q_proj [all]", "4"), ("o", "16")])
    out = capsys.readouterr().out
    assert out == "layers        bits\nq_proj [all]     4\no               16\n"


def test_json_is_strict(capsys):
    Console(Talk(json=True)).json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (1, 2)}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": [1, 2]}}


def on_terminal(code, **environment):
    """What a program writes to a terminal."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100", **environment}
    env.pop("CI", None)
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        said = io.BytesIO()
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not piece:
                break
            said.write(piece)
    os.close(ours)
    assert process.returncode == 0
    return said.getvalue().decode()


BARS = textwrap.dedent("""
    from quantcli.cli.command import Talk
    from quantcli.cli.console import Console
    console = Console(Talk())
    with console.track("blocks", 3) as outer:
        outer.advance(1, "loss 0.25")
        with console.track("rows", 2) as inner:
            inner.advance(2)
        console.note("in between")
        outer.advance(2)
    console.warn("mind")
""")


def test_a_terminal_gets_nested_bars_with_detail():
    said = on_terminal(BARS)
    for word in ("blocks", "3/3", "rows", "loss 0.25", "in between", "\x1b["):
        assert word in said


def test_no_color():
    assert "\x1b[1;33m" in on_terminal(BARS) or "\x1b[33" in on_terminal(BARS)
    said = on_terminal(BARS, NO_COLOR="1")
    assert "warning" in said
    assert "\x1b[1;33m" not in said
    assert "\x1b[33" not in said


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (812_000_000, "812 MB"), (1_350_000_000, "1.35 GB"), (5e12, "5 TB")],
)
def test_sizes(size, words):
    assert human_size(size) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, words):
    assert human_duration(seconds) == words


def test_long_messages_stay_one_line_in_a_pipe(capsys):
    console = Console(Talk())
    console.note("word " * 100)
    console.warn("word " * 100)
    assert len(capsys.readouterr().err.splitlines()) == 2
