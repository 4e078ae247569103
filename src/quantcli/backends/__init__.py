"""External packages that do the job instead of our own code: what there is, where it is installed, how it is run.

A worker, `workers/NAME_worker.py`, is a script that runs in the backend's environment and knows nothing of quantcli: it
reads a job as JSON, says lines of JSON on stdout, and writes a folder or a graph.
"""

from quantcli.backends.backend import Backend, Method, Setting
from quantcli.backends.table import BACKENDS
from quantcli.errors import UsageError, nearest

__all__ = ["BACKENDS", "Backend", "Method", "Setting", "find_backend"]


def find_backend(name: str) -> Backend:
    """The backend of that name, or a UsageError that names the nearest."""
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}, {nearest(name, BACKENDS)}", hint="see `quantcli backends`")
    return BACKENDS[name]
