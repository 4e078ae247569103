"""What workers for ONNX graphs have in common: samples from files, one file of weights beside the graph."""

from pathlib import Path

import numpy as np


class Samples:
    """Samples of a folder of .npz files, by name; what onnxruntime calls a CalibrationDataReader."""

    def __init__(self, folder):
        self._files = sorted(Path(folder).glob("*.npz"))
        self.rewind()

    def __len__(self):
        return len(self._files)

    def __iter__(self):
        self.rewind()
        return iter(self.get_next, None)

    def get_next(self):
        """The next sample by input name; None after the last."""
        file = next(self._rest, None)
        if file is None:
            return None
        with np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def rewind(self):
        """Begins once more."""
        self._rest = iter(self._files)

    def joined(self):
        """All samples as one array for each input, along the first axis."""
        found = list(self)
        return {name: np.concatenate([sample[name] for sample in found]) for name in found[0]}


def save(model, target):
    """Writes a graph with its weights in a file beside it, where they are of any size."""
    import onnx

    target = Path(target)
    large = sum(len(t.raw_data) for t in model.graph.initializer) > 1 << 16
    data = target.with_name(target.name + ".data")
    data.unlink(missing_ok=True)
    options = {"save_as_external_data": True, "location": data.name, "size_threshold": 1024} if large else {}
    onnx.save_model(model, str(target), **options)
