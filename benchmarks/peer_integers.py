"""onnxruntime's own dynamic and static quantizers, with its defaults behind its own preparation."""

from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

__all__ = ["quantize_with_onnxruntime"]


class _Reader(CalibrationDataReader):
    """The .npz files of a folder, one batch each."""

    def __init__(self, folder: Path):
        self._rest = iter(sorted(folder.glob("*.npz")))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next one."""
        path = next(self._rest, None)
        return None if path is None else dict(np.load(path))


def quantize_with_onnxruntime(
    graph: Path,
    samples: Path,
    output: Path,
    kind: str,
    method: str = "MinMax",
    per_channel: bool = False,
    op_types: Sequence[str] | None = None,
) -> None:
    """Writes `output`/model with the quantized graph.

    Args:
        graph: Float graph.
        samples: Folder of .npz files, one batch each.
        output: Folder to make.
        kind: dynamic or static.
        method: Of static: MinMax, Entropy or Percentile.
        per_channel: One scale per output channel of weights.
        op_types: Of static: operators; all where None.
    """
    (output / "model").mkdir(parents=True)
    graph, output = graph.resolve(), output.resolve()
    ready, made = output / "ready.onnx", output / "model" / graph.name
    with chdir(output):  # where it fails, its weights stay behind in the current folder
        try:
            quant_pre_process(graph, ready)
        except Exception:  # its symbolic shape inference raises plain exceptions on graphs that it does not know
            quant_pre_process(graph, ready, skip_symbolic_shape=True)
    if kind == "dynamic":
        quantize_dynamic(ready, made, per_channel=per_channel)
        return
    quantize_static(
        ready,
        made,
        _Reader(samples),
        per_channel=per_channel,
        calibrate_method=CalibrationMethod[method],
        op_types_to_quantize=None if op_types is None else list(op_types),
    )
