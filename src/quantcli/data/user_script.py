"""Functions in a Python file of the user's own, which is run."""

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantcli.errors import InputError, QuantcliError, UsageError, nearest

__all__ = ["explained", "load_function", "takes_by_name"]


def load_function(script: Path, function: str) -> Callable[..., Any]:
    """A function, or a class, of a file.

    Raises:
        UsageError: no such file, or no such function in it.
        InputError: the file fails.
    """
    if not script.is_file():
        raise UsageError(f"user script {script} does not exist")
    spec = importlib.util.spec_from_file_location(f"user_script_{script.stem}", script)
    if spec is None or spec.loader is None:
        raise UsageError(f"user script {script} is no Python file", hint="its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    with explained(str(script)):
        spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if inspect.isroutine(v) or inspect.isclass(v)]
        raise UsageError(f"{script} has no function {function!r}, {nearest(function, names)}")
    return found  # type: ignore[no-any-return]


def takes_by_name(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments on offer that a function takes by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, it does not say
        return {}
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in offered.items() if everything or name in named}


@contextmanager
def explained(origin: str) -> Iterator[None]:
    """Turns whatever the user's code raises into an error that names the code.

    Raises:
        InputError: it raised something.
    """
    try:
        yield
    except QuantcliError:
        raise
    except (Exception, SystemExit) as error:  # exit() in a script is no end of ours
        raise InputError(f"{origin} failed: {type(error).__name__}: {error}") from error
