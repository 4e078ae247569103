"""What all workers do: read the job, speak JSON on stdout, say how it ended. Standard library only."""

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from importlib import metadata
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_EXIT_CODES = {"model": 3, "memory": 4}


class RefusedError(Exception):
    """The model, or what is asked of it, is nothing that the package takes."""


class Job:
    """A job with its values as attributes, and a voice."""

    def __init__(self, values, stream):
        self.__dict__.update(values)
        self._stream = stream
        self.told = {}
        """What is to be said of the result."""

    def say(self, **values):
        """One line for whoever gave the job."""
        self._stream.write(json.dumps(values) + "\n")
        self._stream.flush()

    def note(self, text):
        """Something worth knowing."""
        self.say(note=text)

    def warn(self, text):
        """Something that the user should expect."""
        self.say(warn=text)

    def step(self, label, at, of, detail=""):
        """How far it is."""
        self.say(step=label, at=at, of=of, detail=detail)


def run(work):
    """Runs `work(job)` on the job that the command line names, and exits."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print goes to the log
    if sys.platform == "linux":  # a parent that is killed outright cannot end us
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = Job(json.loads(Path(sys.argv[1]).read_text()), stream)
    try:
        for name in job.imports:
            importlib.import_module(name)
        work(job)
    except RefusedError as error:
        _end(job, str(error), "model")
    except MemoryError as error:
        traceback.print_exc()
        _end(job, f"out of memory: {error}", "memory")
    except Exception as error:
        traceback.print_exc()
        fault = "memory" if _is_out_of_memory(error) else ""
        _end(job, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}", fault)
    job.say(done=True, versions=_versions(job.packages), told=job.told)
    stream.close()
    sys.stdout.flush()
    os._exit(0)  # packages' threads and exit hooks have nothing more to say


def _end(job, message, fault):
    job.say(error=message, fault=fault)
    sys.stderr.flush()
    os._exit(_EXIT_CODES.get(fault, 1))


def _is_out_of_memory(error):
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text or "Failed to allocate" in text


def _versions(packages):
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
