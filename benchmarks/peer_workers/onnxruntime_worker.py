"""onnxruntime's MatMulNBitsQuantizer: `onnxruntime_worker.py FOLDER INPUTS OUTPUT SETTINGS`.

FOLDER is an ONNX Runtime GenAI folder with a float model.onnx, INPUTS a folder of .npz files, OUTPUT gets model/ and
report.json, SETTINGS is JSON with algorithm, bits, group_size, symmetric and rows (for gptq: how many of the files).
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from measure import Measurement
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization import matmul_nbits_quantizer as tool


class Reader(CalibrationDataReader):
    """The first .npz files, one batch each."""

    def __init__(self, folder: Path, rows: int):
        self._rest = iter(sorted(folder.glob("*.npz"))[:rows])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch."""
        path = next(self._rest, None)
        return None if path is None else dict(np.load(path))


def config(settings: dict[str, Any], inputs: Path) -> Any:
    """Of the algorithm that is asked for; None for the default, which takes the quantizer's own arguments."""
    algorithm, bits, size = settings["algorithm"], settings["bits"], settings["group_size"]
    if algorithm == "default":
        return None
    if algorithm == "hqq":
        return tool.HQQWeightOnlyQuantConfig(block_size=size, bits=bits)
    if bits != 4:
        raise SystemExit(f"{algorithm} makes 4 bits whatever is asked for")
    if algorithm == "gptq":
        return tool.GPTQWeightOnlyQuantConfig(calibration_data_reader=Reader(inputs, settings["rows"]))
    kinds = {"rtn": tool.RTNWeightOnlyQuantConfig, "kquant": tool.KQuantWeightOnlyQuantConfig}
    return kinds[algorithm]()


def main() -> None:
    folder, inputs, output = (Path(a).absolute() for a in sys.argv[1:4])
    settings = json.loads(sys.argv[4])
    measurement = Measurement()
    quantizer = tool.MatMulNBitsQuantizer(
        onnx.load(folder / "model.onnx"),  # from a path, its rtn and kquant write an embedding that points nowhere
        bits=settings["bits"],
        block_size=settings["group_size"],
        is_symmetric=settings["symmetric"],
        algo_config=config(settings, inputs),
    )
    measurement.mark("load")
    quantizer.process()
    measurement.mark("solve")
    model = output / "model"
    model.mkdir(parents=True)
    quantizer.model.save_model_to_file(str(model / "model.onnx"), True)
    measurement.mark("save")
    for path in folder.iterdir():
        if path.is_file() and ".onnx" not in path.name:
            shutil.copyfile(path, model / path.name)
    measurement.done(output, version=onnxruntime.__version__, settings=settings)


if __name__ == "__main__":
    main()
