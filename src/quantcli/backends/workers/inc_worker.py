"""onnx-neural-compressor on a graph."""

import onnx
import worker_graphs
import worker_job


def quantize(job):
    """Integers, or weights alone in MatMulNBits."""
    job.step(job.method, 0, 1)
    if job.method in ("static", "dynamic"):
        _integers(job)
    else:
        _weights(job)
    job.step(job.method, 1, 1)


def _integers(job):
    from onnx_neural_compressor.quantization import CalibrationMethod, QuantFormat, QuantType, config
    from onnx_neural_compressor.quantization import quantize as run

    common = {
        "nodes_to_quantize": job.nodes or None,
        "nodes_to_exclude": job.excluded,
        "op_types_to_quantize": job.op_types or None,
        "per_channel": job.settings["per_channel"],
        "reduce_range": job.settings["reduce_range"],
        "use_external_data_format": True,
        "execution_provider": "CPUExecutionProvider",
    }
    if job.method == "dynamic":
        chosen = config.DynamicQuantConfig(**common)
    else:
        names = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
        types = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}
        samples = worker_graphs.Samples(job.feeds)
        chosen = config.StaticQuantConfig(
            samples,
            calibrate_method=getattr(CalibrationMethod, names[job.settings["calibrate_method"]]),
            quant_format=QuantFormat.QDQ if job.encoding == "qdq" else QuantFormat.QOperator,
            activation_type=types[job.settings["activation_type"]],
            weight_type=types[job.settings["weight_type"]],
            calibration_sampling_size=len(samples),
            **common,
        )
    run(job.input, job.output, chosen)


def _weights(job):
    from onnx_neural_compressor.quantization import matmul_nbits_quantizer as nbits

    if job.method == "rtn":
        how = nbits.RTNWeightOnlyQuantConfig()
    elif job.method == "gptq":
        how = nbits.GPTQWeightOnlyQuantConfig(worker_graphs.Samples(job.feeds))
    else:
        how = nbits.AWQWeightOnlyQuantConfig(worker_graphs.Samples(job.feeds))
    quantizer = nbits.MatMulNBitsQuantizer(
        job.input,
        n_bits=job.bits,
        block_size=job.group_size,
        is_symmetric=job.symmetric,
        accuracy_level=job.accuracy_level,
        nodes_to_exclude=job.excluded,
        algo_config=how,
    )
    quantizer.process()
    made = quantizer.model
    worker_graphs.save(made if isinstance(made, onnx.ModelProto) else made.model, job.output)


if __name__ == "__main__":
    worker_job.run(quantize)
