"""Runs quantcli's command lines in children forked from one process that has imported everything.

A child is a process of its own, which may be stopped, interrupted and killed, without the seconds that a start takes.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["NOT_BEGUN", "Child", "Nursery", "until"]

NOT_BEGUN = 70  # the exit code of a child that a signal met before its command line was begun


class Child:
    """One command line under way."""

    def __init__(self, nursery: "Nursery", pid: int, log: Path):
        self._nursery, self.pid, self._log = nursery, pid, log

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, or the negative number of the signal that killed it."""
        return self._nursery.ask({"wait": self.pid})

    @property
    def err(self) -> str:
        """What it wrote to stderr."""
        return self._log.read_text()


class Nursery:
    """The process that forks."""

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "HF_HUB_OFFLINE")}
        environment = os.environ | one | {"QUANTCLI_CACHE": str(folder / "cache")}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: dict[str, object]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, args: Sequence[str]) -> Child:
        """Begins a command line."""
        self._count += 1
        log = self._folder / f"stderr-{self._count}.txt"
        return Child(self, self.ask({"run": list(args), "log": str(log)}), log)

    def warm(self, args: Sequence[str]) -> int:
        """A command line in the forking process itself: its children inherit what it imports.

        It must not run compiled kernels, whose threads do not survive a fork.
        """
        return self.ask({"warm": list(args)})

    def run(self, args: Sequence[str]) -> int:
        """A command line from beginning to end."""
        return self.start(args).wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Waits for something to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


def _run(args: list[str]) -> int:
    from quantcli.cli import app

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return app.run(args)


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        if "warm" in request:
            print(_run(request["warm"]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT), 2)
            code = NOT_BEGUN
            try:
                code = _run(request["run"])
            finally:
                os._exit(code)
        print(child, flush=True)


if __name__ == "__main__":
    _serve()
