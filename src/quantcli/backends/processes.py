"""Runs another program in a process group of its own, within limits of time and memory; nothing of it outlives us."""

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

__all__ = ["Ended", "Limits", "run_group"]

_LOOK_SECONDS = 0.25
_FIRST_LOOK_SECONDS = 0.02
"""What ends at once has a peak too."""
_GRACE_SECONDS = 3.0


@dataclass(frozen=True)
class Limits:
    """What a program may take; None: as much as there is."""

    seconds: float | None = None
    """Of wall clock."""
    memory_bytes: int | None = None
    """Resident memory of the program and all that it starts."""


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    """Its exit code; minus the signal that ended it."""
    seconds: float
    """It took."""
    peak_bytes: int
    """Most resident memory of it and all that it started, looked at four times a second."""
    stopped: Literal["", "time", "memory"] = ""
    """The limit that it was stopped for."""


def run_group(
    argv: Sequence[str],
    log: Path,
    on_line: Callable[[str], None],
    limits: Limits | None = None,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Ended:
    """Runs a program to its end, or to a limit; whatever is raised meanwhile kills it and what it started.

    Args:
        argv: The program and its arguments.
        log: File that its stderr is added to.
        on_line: Given each line of its stdout as it comes.
        limits: Of time and memory.
        variables: All environment variables; default: ours.
        folder: Where it stands; default: where we do.
    """
    limits, begun, peak = limits or Limits(), time.monotonic(), 0
    with log.open("ab") as stream:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stream,
            env=None if variables is None else dict(variables),
            cwd=folder,
            start_new_session=True,  # Ctrl-C reaches us alone, and the group can be killed as a whole
        )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    stopped: Literal["", "time", "memory"] = ""
    looked = -_LOOK_SECONDS
    try:
        while True:
            with suppress(queue.Empty):
                line = lines.get(timeout=_FIRST_LOOK_SECONDS if looked < 0 else _LOOK_SECONDS)
                if line is None:
                    break
                on_line(line)
            now = time.monotonic() - begun
            if now - looked < _LOOK_SECONDS:  # many lines at once
                continue
            looked = now
            if process.poll() is not None and lines.empty():  # what it started holds its stdout open
                break
            held = _resident_bytes(process.pid)
            peak = max(peak, held)
            if limits.memory_bytes is not None and held > limits.memory_bytes:
                stopped = "memory"
            elif limits.seconds is not None and now > limits.seconds:
                stopped = "time"
            if stopped:
                break
        if not stopped:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_GRACE_SECONDS)  # its stdout is closed: it ends now
    finally:
        _kill_group(process)
        reader.join(timeout=_GRACE_SECONDS)
        if process.stdout is not None and not reader.is_alive():
            process.stdout.close()
    return Ended(process.returncode, time.monotonic() - begun, peak, stopped)


def _read(process: "subprocess.Popen[bytes]", lines: "queue.SimpleQueue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line.decode(errors="replace").rstrip("\n"))
    lines.put(None)


def _resident_bytes(pid: int) -> int:
    """Of a process and all below it."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return 0
    held = 0
    for process in family:
        with suppress(psutil.Error):
            held += process.memory_info().rss
    return held


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends what is left of a group: asked first, killed after three seconds."""
    for number, grace in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace)
        if process.returncode is not None and number == signal.SIGTERM:
            # the leader is gone; members of its group that do not mind SIGTERM are not waited for
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait()
