"""A metric of the user's own: a function in a Python file that judges an onnxruntime session."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantcli.data.user_script import explained, load_function, takes_by_name
from quantcli.errors import InputError
from quantcli.graphs.model.session import open_session

__all__ = ["GraphMetric"]


class GraphMetric:
    """The function, loaded once."""

    def __init__(self, script: Path, function: str, offered: Mapping[str, Any], *, of_graphs: bool = True):
        """Runs the file.

        Args:
            script: The file.
            function: Its function: takes a session, and any of what is offered by name; returns a number.
            offered: What it may take.
            of_graphs: Whether graphs are judged; else the function is given the folder of a checkpoint, as text.

        Raises:
            UsageError: no such file or function.
            InputError: the file fails.
        """
        self._origin = f"{script}:{function}"
        self._function = load_function(script, function)
        always = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
        self._arguments = takes_by_name(self._function, always | dict(offered))
        self._of_graphs = of_graphs

    def __call__(self, graph: Path) -> float:
        """What it returns for a graph.

        Raises:
            InputError: the graph cannot be opened, or the function fails or returns no finite number.
        """
        judged = _as_handler(graph) if self._of_graphs else str(graph)
        with explained(f"{self._origin} on {graph.name}"):
            found = self._function(judged, **self._arguments)
            value = _number(found)
        if value is None:
            raise InputError(f"{self._origin} returned {type(found).__name__} for {graph}, expected one number")
        if not math.isfinite(value):
            raise InputError(f"{self._origin} returned {value} for {graph}, expected a finite number")
        return value


def _as_handler(graph: Path) -> Any:
    """A session that is also what Olive hands to metrics: it prepares and runs itself."""
    session: Any = open_session(graph, what=str(graph))
    session.model_path = str(graph)
    session.prepare_session = lambda *_, **__: session
    session.run_session = lambda prepared, inputs, *_, **__: prepared.run(None, inputs)
    return session


def _number(found: Any) -> float | None:
    """One real number, whether of Python, numpy or torch; None for anything else."""
    array = np.asarray(found)
    return float(array.reshape(())) if array.size == 1 and array.dtype.kind in "iuf" else None
