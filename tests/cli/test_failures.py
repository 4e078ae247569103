"""One line, one hint, the right exit code; and a traceback only where the bug is ours."""

import errno
import subprocess
import sys

import pytest

from quantcli import errors
from quantcli.cli import app
from quantcli.cli.failures import as_quantcli_error, report

QUANTIZE = ["quantize", "-m", "M", "-o", "O"]


def lines(capsys, argv):
    code = app.run(argv)
    out, err = capsys.readouterr()
    assert out == ""
    return code, err.splitlines()


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["quantise"], "unknown command 'quantise', did you mean 'quantize'?", "quantcli --help"),
        (["--versoin"], "unknown flag --versoin, did you mean --version?", "quantcli --help"),
        ([*QUANTIZE, "--bitz", "3"], "unknown flag --bitz, did you mean --bits?", "quantcli quantize --help"),
        ([*QUANTIZE, "--xyzzy"], "unknown flag --xyzzy", "quantcli quantize --help"),
        (["quantize", "-o", "O"], "--model is required", "quantcli quantize --help"),
        (["quantize", "-m", "M"], "--output is required", "quantcli quantize --help"),
        (["inspect"], "FOLDER is required", "quantcli inspect --help"),
        ([*QUANTIZE, "--bits", "four"], "--bits: 'four' is not a whole number", "quantcli quantize --help"),
        ([*QUANTIZE, "--bits"], "--bits needs a value", "quantcli quantize --help"),
        (["evaluate", "--max-kl", "nan"], "--max-kl: 'nan' is not a finite number", "quantcli evaluate --help"),
        (["evaluate", "-m", "M", "--max-kl", "0.1"], "--max-kl needs --reference", "add --reference ORIGINAL"),
        (["algorithms", "gtpq"], "unknown algorithm 'gtpq', did you mean 'gptq'?", "quantcli algorithms"),
        ([*QUANTIZE, "--preset", "bset"], "unknown preset 'bset', did you mean 'best'?", None),
        ([*QUANTIZE, "stray"], "got unexpected extra argument(s) (stray)", "quantcli quantize --help"),
    ],
)  # fmt: skip
def test_usage_errors(capsys, argv, message, hint):
    code, said = lines(capsys, argv)
    assert code == 2
    assert said == [f"error: {message}"] + ([f"hint: {hint}"] if hint else [])


def test_nothing_asked_is_help_on_stderr_and_a_usage_exit(capsys):
    code, said = lines(capsys, [])
    assert code == 2
    assert said[0].startswith("Usage: quantcli")


@pytest.mark.parametrize("name", [None, *app.COMMANDS])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_goes_to_stdout(capsys, name, flag):
    assert app.run([name, flag] if name else [flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"Usage: quantcli {name or ''}".rstrip())
    assert out.count("\n  quantcli ") in range(3, 9)  # the examples


def test_version(capsys):
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == "quantcli 0.1.0\n"


@pytest.mark.parametrize(
    ("error", "code", "first"),
    [
        (errors.UsageError("u"), 2, "error: u"),
        (errors.InputError("a\nb"), 3, "error: a b"),
        (errors.ResourceError("r"), 4, "error: r"),
        (errors.QualityError("q"), 5, "error: q"),
        (errors.InterruptedRunError("i", hint="again"), 130, "error: i"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError(), 4, "error: out of memory: an allocation failed"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            4,
            "error: out of memory: ",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 4, "error: cannot write f: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 3, "error: permission denied: f"),
    ],
)
def test_what_the_user_can_act_on(capsys, error, code, first):
    assert report(error) == code
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(first)
    assert len(said) <= 2


def test_our_bugs_keep_their_traceback(capsys):
    try:
        {}["missing"]
    except KeyError as error:
        assert as_quantcli_error(error) is None
        assert report(error) == 1
    said = capsys.readouterr().err
    assert "Traceback (most recent call last):" in said
    assert said.splitlines()[-1] == "error: this is a bug in quantcli, please report it: KeyError: 'missing'"


@pytest.mark.parametrize("switch", ["-v", "QUANTCLI_DEBUG"])
def test_verbose_shows_every_traceback(capsys, monkeypatch, switch):
    argv = ["algorithms", "gtpq"]
    assert app.run(argv) == 2
    assert "Traceback" not in capsys.readouterr().err
    if switch == "-v":
        argv.append("-v")
    else:
        monkeypatch.setenv(switch, "1")
    assert app.run(argv) == 2
    assert "Traceback" in capsys.readouterr().err


def test_every_kind_of_error_has_its_own_exit_code():
    classes = [getattr(errors, n) for n in errors.__all__ if isinstance(getattr(errors, n), type)]
    assert sorted({c.exit_code for c in classes}) == [1, 2, 3, 4, 5, 130]


def test_a_reader_that_goes_away_is_nobodys_error():
    script = f"{sys.executable} -m quantcli algorithms --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 where the text was written before `true` ended
