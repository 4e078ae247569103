"""Gives a worker its job and watches it: progress into our bar, failures into our errors."""

import json
import os
import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli.backends.backend import Backend
from quantcli.backends.environments import logs, python_of
from quantcli.backends.processes import Ended, Limits, run_group
from quantcli.errors import InputError, QuantcliError, ResourceError
from quantcli.folder import write_json
from quantcli.progress import Progress, Task

__all__ = ["Work", "run_worker"]

_WORKERS = Path(__file__).with_name("workers")


@dataclass(frozen=True)
class Work:
    """What a worker did."""

    versions: dict[str, str]
    """Of the packages in its environment."""
    seconds: float
    peak_bytes: int
    """Most memory of it and all that it started."""
    told: dict[str, Any] = field(default_factory=dict)
    """What else it said of the result."""


def run_worker(
    backend: Backend,
    job: Mapping[str, Any],
    scratch: Path,
    limits: Limits,
    progress: Progress,
    script: Path | None = None,
) -> Work:
    """Runs a backend's worker on a job.

    Args:
        backend: Whose environment and script.
        job: JSON values; paths in it are absolute.
        scratch: Folder for the job's file.
        limits: Of time and memory.
        progress: Shows what it says.
        script: Another script than the backend's.

    Raises:
        UsageError: the backend is not installed.
        InputError: the worker refuses the model.
        ResourceError: a limit is reached, or the system killed it.
        QuantcliError: it failed; its log is named.
    """
    python = python_of(backend)
    script = script or _WORKERS / f"{backend.name.replace('-', '_')}_worker.py"
    write_json(scratch / "job.json", dict(job) | {"packages": backend.packages, "imports": backend.imports})
    log = logs() / f"{backend.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    listener = _Listener(backend, log, progress)
    argv = [str(python), "-u", str(script), str(scratch / "job.json")]
    try:
        # packages write caches and files of weights where they stand
        ended = run_group(argv, log, listener.hear, limits, _variables(backend), scratch)
    finally:
        listener.close()
    _refuse_failed(backend, ended, limits, listener, log)
    log.unlink(missing_ok=True)
    return Work(listener.versions, ended.seconds, ended.peak_bytes, listener.told)


def _refuse_failed(backend: Backend, ended: Ended, limits: Limits, listener: "_Listener", log: Path) -> None:
    where = f"its log: {log}"
    if ended.stopped == "time":
        raise ResourceError(
            f"{backend.name} took longer than {limits.seconds:g} s and was stopped", hint="give more --timeout"
        )
    if ended.stopped == "memory":
        assert limits.memory_bytes is not None
        raise ResourceError(
            f"{backend.name} took more than {limits.memory_bytes / 1e6:.0f} MB and was stopped",
            hint="give more --max-memory, or less calibration: --num-samples, --seq-len, --batch-size",
        )
    if listener.error is not None:
        fault, message = listener.error
        kind = {"model": InputError, "memory": ResourceError}.get(fault, QuantcliError)
        raise kind(f"{backend.name}: {message}", hint=where)
    if ended.code == -signal.SIGKILL:
        raise ResourceError(f"{backend.name} was killed by the system, which does so when memory is short", hint=where)
    if ended.code != 0:
        how = f"signal {signal.Signals(-ended.code).name}" if ended.code < 0 else f"exit code {ended.code}"
        raise QuantcliError(f"{backend.name} failed with {how}: {_last_line(log)}", hint=where)
    if not listener.done:
        raise QuantcliError(f"{backend.name} ended without a word on its result", hint=where)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _variables(backend: Backend) -> dict[str, str]:
    """Ours, without our modules and without a hub: a worker sees the folders of its job and nothing else."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "VIRTUAL_ENV")}
    if backend.own_environment:
        kept.pop("PYTHONPATH", None)
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return kept | quiet | {"PYTHONNOUSERSITE": "1"} | dict(backend.variables)


class _Listener:
    """Understands lines of a worker; what is no JSON object goes to the log."""

    def __init__(self, backend: Backend, log: Path, progress: Progress):
        self.versions: dict[str, str] = {}
        self.told: dict[str, Any] = {}
        self.error: tuple[str, str] | None = None
        self.done = False
        self._backend, self._log, self._progress = backend, log, progress
        self._open: AbstractContextManager[Task] = nullcontext()  # type: ignore[assignment]
        self._task: Task | None = None
        self._label, self._at = "", 0.0

    def hear(self, line: str) -> None:
        """One line."""
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            with self._log.open("a") as stream:
                stream.write(line + "\n")
            return
        if isinstance(said.get("note"), str):
            self._progress.note(f"{self._backend.name}: {said['note']}")
        if isinstance(said.get("warn"), str):
            self._progress.warn(f"{self._backend.name}: {said['warn']}")
        if isinstance(said.get("error"), str):
            self.error = (str(said.get("fault", "")), said["error"])
        if isinstance(said.get("step"), str) and isinstance(said.get("of"), int | float):
            self._advance(said["step"], float(said.get("at", 0)), float(said["of"]), str(said.get("detail", "")))
        if said.get("done") is True:
            self.done = True
            self.versions = {str(k): str(v) for k, v in dict(said.get("versions") or {}).items()}
            self.told = dict(said.get("told") or {})

    def _advance(self, label: str, at: float, total: float, detail: str) -> None:
        if label != self._label:
            self.close()
            self._open = self._progress.track(f"{self._backend.name}: {label}", total)
            self._task, self._label, self._at = self._open.__enter__(), label, 0.0
        if self._task is not None and at > self._at:
            self._task.advance(at - self._at, detail)
            self._at = at

    def close(self) -> None:
        """Ends the bar."""
        if self._task is not None:
            self._open.__exit__(None, None, None)
            self._task = None
