"""onnxruntime's dynamic and static quantizers: `integers_worker.py GRAPH INPUTS OUTPUT SETTINGS`.

GRAPH is a float graph, INPUTS a folder of .npz files with one batch each, OUTPUT gets model/ and the graph, SETTINGS is
JSON with kind (dynamic or static) and, for static, method, per_channel and op_types. All else are onnxruntime's
defaults, behind its own preparation.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Reader(CalibrationDataReader):
    """The batches in order."""

    def __init__(self, folder: Path):
        self._rest = iter(sorted(folder.glob("*.npz")))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next one."""
        path = next(self._rest, None)
        return None if path is None else dict(np.load(path))


def main() -> None:
    graph, inputs, output = (Path(a).absolute() for a in sys.argv[1:4])
    settings: dict[str, Any] = json.loads(sys.argv[4])
    (output / "model").mkdir(parents=True)
    ready, made = output / "ready.onnx", output / "model" / graph.name
    try:
        quant_pre_process(graph, ready)
    except Exception as error:  # its symbolic shape inference knows not all graphs
        print(f"once more without symbolic shapes: {error}")
        quant_pre_process(graph, ready, skip_symbolic_shape=True)
    if settings["kind"] == "dynamic":
        quantize_dynamic(ready, made, per_channel=settings.get("per_channel", False))
        return
    quantize_static(
        ready,
        made,
        Reader(inputs),
        per_channel=settings.get("per_channel", False),
        calibrate_method=CalibrationMethod[settings.get("method", "MinMax")],
        op_types_to_quantize=settings.get("op_types"),
    )


if __name__ == "__main__":
    main()
