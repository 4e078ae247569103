"""Graphs opened in onnxruntime, on the CPU: the one place that makes sessions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.errors import InputError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxruntime import InferenceSession

__all__ = ["open_session", "run_sample"]


def open_session(
    graph: Path | bytes,
    *,
    optimized: bool = True,
    prepacked: bool = True,
    folder: Path | None = None,
    threads: int = 0,
    spinning: bool | None = None,
    what: str = "the graph",
    error: type[InputError] = InputError,
    hint: str | None = None,
) -> InferenceSession:
    """A session that says nothing of its own on stderr.

    Args:
        graph: A file, or a graph as bytes.
        optimized: As users open it; without, no node is fused with another or computed beforehand.
        prepacked: Whether kernels may keep a copy of the weights in an order of their own.
        folder: Where external data lies; a file's own folder if None.
        threads: At one node; 0: as many as onnxruntime likes.
        spinning: Whether these wait busily between two nodes, as users have it; None: where `optimized`.
        what: The graph in the message.
        error: What to raise.
        hint: What to do about it.

    Raises:
        InputError: onnxruntime cannot open it; with the first line of what it says.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = threads
    if not optimized:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not prepacked:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    if not (optimized if spinning is None else spinning):
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if folder is not None:
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    content = graph if isinstance(graph, bytes) else str(graph)
    try:
        return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    except Exception as problem:  # onnxruntime raises types of its own
        raise error(f"onnxruntime cannot open {what}: {first_line(problem)}", hint) from problem


def run_sample(session: InferenceSession, feed: Mapping[str, np.ndarray], number: int) -> list[Any]:
    """All outputs for one sample.

    Raises:
        InputError: the sample does not run.
    """
    try:
        return list(session.run(None, dict(feed)))
    except Exception as error:  # onnxruntime raises types of its own
        raise InputError(f"sample {number} does not run through the graph: {first_line(error)}") from error
