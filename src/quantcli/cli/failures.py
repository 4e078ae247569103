"""From whatever went wrong to one line, a hint and an exit code."""

import difflib
import errno
import os
import re
import sys
import traceback
from typing import Any

import typer

from quantcli.errors import InputError, InterruptedRunError, QuantcliError, ResourceError, UsageError, nearest

__all__ = ["as_quantcli_error", "as_usage_error", "report", "say"]


def as_quantcli_error(error: BaseException) -> QuantcliError | None:
    """The error that the user can act on, or None where it is our bug."""
    if isinstance(error, QuantcliError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRunError("interrupted")
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        return ResourceError(
            f"out of memory: {_one_line(error) or 'an allocation failed'}",
            hint="use a smaller --batch-size, --seq-len or --num-samples, or a machine with more memory",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"cannot write {error.filename or ''}: {error.strerror}", hint="free disk space")
    if isinstance(error, PermissionError):
        return InputError(f"permission denied: {error.filename}", hint="check who may read or write it")
    return None


def as_usage_error(error: typer.TyperException, path: str) -> UsageError:
    """The parser's complaint in our words, with the nearest valid name; `path` is the command, as in the hint."""
    context = getattr(error, "ctx", None)
    hint = f"{path} --help"
    option = getattr(error, "option_name", None)
    param = getattr(error, "param", None)
    text = _one_line(error)
    if type(error).__name__ == "BadOptionUsage" and "requires an argument" in text:
        return UsageError(f"{option} needs a value", hint=hint)
    if type(error).__name__ == "NoSuchOption" and context is not None:
        known = [name for p in context.command.params for name in (*p.opts, *p.secondary_opts)]
        return UsageError(f"unknown flag {option}{_did_you_mean(str(option), known)}", hint=hint)
    command = re.fullmatch(r"No such command '(.*?)'\..*", text)
    if command is not None and context is not None:
        known = list(context.command.commands)
        return UsageError(f"unknown command {command[1]!r}, {nearest(command[1], known)}", hint=hint)
    if type(error).__name__ == "MissingParameter" and param is not None:
        return UsageError(f"{_spelling(param)} is required", hint=hint)
    if param is not None:
        return UsageError(f"{_spelling(param)}: {getattr(error, 'message', text)}".rstrip("."), hint=hint)
    return UsageError(text[:1].lower() + text[1:].rstrip("."), hint=hint)


def report(error: BaseException, *, verbose: bool = False) -> int:
    """Says on stderr what went wrong; returns the exit code."""
    known = as_quantcli_error(error)
    if known is None or verbose:
        traceback.print_exception(error, file=sys.stderr)
    if known is None:
        say("error", f"this is a bug in quantcli, please report it: {type(error).__name__}: {_one_line(error)}")
        return 1
    say("error", " ".join(known.message.split("\n")))
    if known.hint:
        say("hint", known.hint)
    return known.exit_code


def say(kind: str, message: str) -> None:
    """One line on stderr that starts with its kind, coloured on a terminal unless NO_COLOR is set."""
    colour = {"error": "31", "warning": "33", "hint": "36"}.get(kind)
    if colour and sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        kind = f"\x1b[1;{colour}m{kind}\x1b[0m"
    typer.echo(f"{kind}: {message}", err=True, color=True)


def _spelling(param: Any) -> str:
    """`--model` for a flag, `FOLDER` for a positional argument."""
    name: str = max(param.opts, key=len)
    return name if name.startswith("-") else name.upper()


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def _one_line(error: BaseException) -> str:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(str(text).split())


def _is_torch_out_of_memory(error: BaseException) -> bool:
    # torch is not imported to ask: it says so by a class of its own on CUDA and by a text on the CPU
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
