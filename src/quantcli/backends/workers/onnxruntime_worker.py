"""onnxruntime's own quantizers, as they are."""

import logging
import tempfile
from pathlib import Path

import onnx
import worker_graphs
import worker_job
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.shape_inference import quant_pre_process

_TYPES = {
    "int8": QuantType.QInt8,
    "uint8": QuantType.QUInt8,
    "int16": QuantType.QInt16,
    "uint16": QuantType.QUInt16,
    "int4": QuantType.QInt4,
    "uint4": QuantType.QUInt4,
}
_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


def quantize(job):
    """One graph."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory(dir=Path(job.output).parent) as folder:
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(job.input, ready, save_as_external_data=True, skip_symbolic_shape=True)
        if job.method in ("static", "dynamic"):
            _integers(job, ready)
        else:
            _weights(job, ready)


def _integers(job, ready):
    settings = job.settings
    common = {
        "op_types_to_quantize": job.op_types or None,
        "nodes_to_quantize": job.nodes or None,
        "nodes_to_exclude": job.excluded,
        "per_channel": settings["per_channel"],
        "reduce_range": settings["reduce_range"],
        "weight_type": _TYPES[settings["weight_type"]],
        "use_external_data_format": True,
    }
    job.step(job.method, 0, 1)
    if job.method == "dynamic":
        quantize_dynamic(ready, job.output, **common)
    else:
        quantize_static(
            ready,
            job.output,
            worker_graphs.Samples(job.feeds),
            quant_format=QuantFormat.QDQ if job.encoding == "qdq" else QuantFormat.QOperator,
            activation_type=_TYPES[settings["activation_type"]],
            calibrate_method=_METHODS[settings["calibrate_method"]],
            **common,
        )
    job.step(job.method, 1, 1)


def _weights(job, ready):
    operators = tuple(job.op_types) or ("MatMul",)
    if job.method == "rtn":
        config = nbits.DefaultWeightOnlyQuantConfig(
            block_size=job.group_size,
            is_symmetric=job.symmetric,
            accuracy_level=job.accuracy_level,
            op_types_to_quantize=operators,
            bits=job.bits,
        )
    elif job.method == "hqq":
        config = nbits.HQQWeightOnlyQuantConfig(
            block_size=job.group_size, bits=job.bits, op_types_to_quantize=operators
        )
    elif job.method == "kquant":
        config = nbits.KQuantWeightOnlyQuantConfig(op_types_to_quantize=operators)
    else:
        config = nbits.GPTQWeightOnlyQuantConfig(
            calibration_data_reader=worker_graphs.Samples(job.feeds),
            percdamp=job.settings["damp_percent"],
            block_size=job.group_size,
            op_types_to_quantize=operators,
        )
    model = onnx.load(ready)
    quantizer = nbits.MatMulNBitsQuantizer(
        model,
        bits=job.bits,
        block_size=job.group_size,
        is_symmetric=job.symmetric,
        accuracy_level=job.accuracy_level,
        nodes_to_exclude=job.excluded,
        nodes_to_include=job.nodes or None,
        op_types_to_quantize=operators,
        algo_config=config,
    )
    job.step(job.method, 0, 1)
    quantizer.process()
    job.step(job.method, 1, 1)
    worker_graphs.save(quantizer.model.model, job.output)


if __name__ == "__main__":
    worker_job.run(quantize)
