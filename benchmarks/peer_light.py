"""onnxruntime's own quantizers with their defaults: `peer_light.py METHOD GRAPH OUTPUT SAMPLES [prepared]`."""

import sys
from pathlib import Path


def main(method: str, graph: str, output: str, samples: str, prepared: bool) -> None:
    """Imports what the method needs, and nothing else."""
    if prepared:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        ready = output.replace(".onnx", ".ready.onnx")
        try:
            quant_pre_process(graph, ready)
        except Exception:  # its symbolic shape inference raises plain exceptions on graphs that it does not know
            quant_pre_process(graph, ready, skip_symbolic_shape=True)
        graph = ready
    if method == "dynamic":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(graph, output)
    elif method == "static":
        from onnxruntime.quantization import quantize_static

        quantize_static(graph, output, _reader(Path(samples)))
    else:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(onnx.load(graph), block_size=64, is_symmetric=False)
        quantizer.process()
        quantizer.model.save_model_to_file(output, False)


def _reader(folder: Path):  # type: ignore[no-untyped-def]
    import numpy as np
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        """The .npz files of a folder."""

        def __init__(self) -> None:
            self._rest = iter(sorted(folder.glob("*.npz")))

        def get_next(self):  # type: ignore[no-untyped-def]
            """The next one."""
            path = next(self._rest, None)
            return None if path is None else dict(np.load(path))

    return Reader()


if __name__ == "__main__":
    main(*sys.argv[1:5], prepared=len(sys.argv) > 5)
