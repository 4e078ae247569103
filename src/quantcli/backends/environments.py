"""Environments of backends: made of pinned requirements that ship with us, below `QUANTCLI_HOME`; we are not in them.

`installed.json` is written last: an environment without it is not there, and the next install goes on with it.
"""

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from quantcli.backends.backend import Backend
from quantcli.backends.processes import run_group
from quantcli.errors import InterruptedRunError, ResourceError, UsageError
from quantcli.folder import folder_size_bytes, require_free_bytes, write_json
from quantcli.json_files import read_json
from quantcli.progress import Progress

__all__ = [
    "Installed",
    "home",
    "install",
    "installed",
    "logs",
    "pinned",
    "python_of",
    "remove",
    "requirements_file",
    "state_of",
]

_MARK = "installed.json"
_LOCKS = Path(__file__).with_name("requirements")


@dataclass(frozen=True)
class Installed:
    """What `installed.json` says."""

    backend: str
    requirements: str
    """Digest of the file of pins."""
    seconds: float
    """The install took."""
    size_bytes: int
    """Of the environment."""
    installer: str
    """uv or pip."""


def home() -> Path:
    """Where quantcli keeps what is not a cache: `QUANTCLI_HOME`, else below the user's data folder."""
    named = os.environ.get("QUANTCLI_HOME")
    if named:
        return Path(named).absolute()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "quantcli"


def logs() -> Path:
    """Where logs of failures lie; made where it is missing."""
    folder = home() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def requirements_file(backend: Backend) -> Path:
    """Its pins, every package of the environment with its version."""
    return _LOCKS / f"{backend.name}.txt"


def pinned(backend: Backend) -> dict[str, str]:
    """Package to version, as installed; of a backend without an environment, nothing."""
    if not backend.own_environment:
        return {}
    lines = requirements_file(backend).read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name.strip().lower()): version.strip() for name, version in pairs}


def installed(backend: Backend) -> Installed | None:
    """What is installed; None where nothing is, or half of it."""
    mark = _folder(backend) / _MARK
    return read_json(mark, Installed, "what an install leaves") if mark.is_file() else None


def state_of(backend: Backend) -> str:
    """In a word or two: installed, not installed, interrupted, outdated; here for one without an environment."""
    if not backend.own_environment:
        return "here"
    found = installed(backend)
    if found is None:
        return "interrupted" if _folder(backend).is_dir() else "not installed"
    return "installed" if found.requirements == _digest(backend) else "outdated"


def python_of(backend: Backend) -> Path:
    """The Python that runs its workers.

    Raises:
        UsageError: it is not installed; the hint is the command that does it.
    """
    if not backend.own_environment:
        return Path(sys.executable)
    state = state_of(backend)
    if state not in ("installed", "outdated"):
        raise UsageError(
            f"backend {backend.name} is {'half installed' if state == 'interrupted' else 'not installed'}",
            hint=f"run `quantcli backends install {backend.name}`",
        )
    return _python(_folder(backend))


def install(backend: Backend, installer: str, torch_index: str | None, progress: Progress) -> Installed:
    """Makes the environment, or goes on where an interrupted install ended.

    Args:
        backend: Which.
        installer: uv, pip, or auto: uv where it is there.
        torch_index: URL of an index for torch; None: where the installer looks anyway.
        progress: Told of each step.

    Raises:
        ResourceError: packages cannot be had, or there is no room; nothing is left.
        InterruptedRunError: Ctrl-C; the same command goes on.
    """
    uv = shutil.which("uv") if installer in ("auto", "uv") else None
    if installer == "uv" and uv is None:
        raise UsageError("uv is not on the path", hint="use --installer pip, or install uv")
    folder, begun = _folder(backend), time.perf_counter()
    require_free_bytes(folder.parent, int(1.3e6 * backend.size_mb))
    with _locked(backend):
        if (folder / _MARK).is_file() and state_of(backend) == "installed":
            progress.note(f"{backend.name} is installed already")
            return read_json(folder / _MARK, Installed, "what an install leaves")
        if folder.is_dir() and not (folder / _MARK).is_file():
            progress.note(f"going on with an interrupted install of {backend.name}")
        (folder / _MARK).unlink(missing_ok=True)
        steps = _steps(backend, folder, uv, torch_index)
        try:
            with progress.track(f"installing {backend.name}", len(steps)) as task:
                for what, argv in steps:
                    task.advance(0, what)
                    _step(backend, what, argv)
                    task.advance(1, what)
        except KeyboardInterrupt as error:
            hint = f"`quantcli backends install {backend.name}` goes on, remove instead of install drops it"
            raise InterruptedRunError("interrupted", hint=hint) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        seconds = round(time.perf_counter() - begun, 1)
        found = Installed(
            backend.name, _digest(backend), seconds, folder_size_bytes(folder), "uv" if uv is not None else "pip"
        )
        write_json(folder / _MARK, found.__dict__)
        return found


def remove(backend: Backend) -> int:
    """Removes the environment, whole or half; bytes that were freed.

    Raises:
        UsageError: there is none.
    """
    folder = _folder(backend)
    if not folder.is_dir():
        raise UsageError(f"backend {backend.name} is not installed", hint="see `quantcli backends`")
    with _locked(backend):
        size = folder_size_bytes(folder)
        (folder / _MARK).unlink(missing_ok=True)  # first: a kill leaves no environment that seems whole
        shutil.rmtree(folder)
    return size


def _steps(backend: Backend, folder: Path, uv: str | None, torch_index: str | None) -> list[tuple[str, list[str]]]:
    """What is run, one after the other; each finds what it has done before, and does no more."""
    pins, python = str(requirements_file(backend)), str(_python(folder))
    if uv is not None:
        make = [uv, "venv", "--allow-existing", "--python", sys.executable, str(folder)]
        add = [uv, "pip", "install", "--python", python]
    else:
        ours = find_spec("pip") is not None  # ours installs into another environment, which then needs none
        make = [sys.executable, "-m", "venv", *(["--without-pip"] if ours else []), str(folder)]
        run = [sys.executable, "-m", "pip", "--python", python] if ours else [python, "-m", "pip"]
        add = [*run, "install", "--disable-pip-version-check", "--progress-bar", "off"]
    index = ["--extra-index-url", torch_index] if torch_index is not None else []
    steps = [("an empty environment", make)]
    found = pinned(backend)
    if "torch" in found:  # with what it depends on: elsewhere than on a CPU those are libraries of CUDA
        steps.append((f"torch {found['torch']}", [*add, *index, "--constraint", pins, f"torch=={found['torch']}"]))
    # every package is pinned: nothing is left to resolve, and what packages say of each other's versions, often wrong,
    # has no say
    steps.append((f"{len(found)} packages", [*add, *index, "--no-deps", "--requirement", pins]))
    steps.append(("trying it", [python, "-c", "; ".join(f"import {name}" for name in backend.imports)]))
    return steps


def _step(backend: Backend, what: str, argv: Sequence[str]) -> None:
    log = logs() / f"install-{backend.name}.log"
    log.write_text(f"$ {' '.join(argv)}\n")
    said: list[str] = []

    def keep(line: str) -> None:
        said.append(line)
        with log.open("a") as stream:
            stream.write(line + "\n")

    ended = run_group(argv, log, keep, variables=_environment(backend))
    if ended.code == 0:
        log.unlink()
        return
    raise ResourceError(f"{backend.name} cannot be installed ({what}): {_reason(log)}", hint=f"the whole log: {log}")


def _reason(log: Path) -> str:
    """The line of an installer's log that says why; the last one where none is marked."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    marked = [
        line for line in lines if line.startswith(("ERROR:", "error:", "×", "ModuleNotFoundError", "ImportError"))
    ]
    if any("NewConnectionError" in line or "Name or service" in line or "dns error" in line for line in lines):
        return "the package index cannot be reached"
    return (marked or lines[-1:] or ["no reason was given"])[0][:300]


def _environment(backend: Backend) -> Mapping[str, str]:
    """Ours without what would mix environments."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {"PYTHONNOUSERSITE": "1"} | dict(backend.variables)


def _folder(backend: Backend) -> Path:
    return home() / "backends" / backend.name


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _digest(backend: Backend) -> str:
    return hashlib.sha256(requirements_file(backend).read_bytes()).hexdigest()


@contextmanager
def _locked(backend: Backend) -> Iterator[None]:
    folder = _folder(backend)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"another process is installing {backend.name} right now", hint="wait for it") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
