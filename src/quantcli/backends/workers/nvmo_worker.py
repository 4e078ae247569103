"""NVIDIA ModelOpt on a graph."""

import re

import worker_graphs
import worker_job


def quantize(job):
    """int4 weights, or int8 and fp8 with activations."""
    excluded = [f"^{re.escape(name)}$" for name in job.excluded]
    job.step(job.method, 0, 1)
    if job.method in ("int8", "fp8"):
        from modelopt.onnx.quantization import quantize as run

        run(
            job.input,
            quantize_mode=job.method,
            calibration_data=worker_graphs.Samples(job.feeds).joined(),
            calibration_method=job.settings.get("calibrate_method", "max"),
            calibration_eps=["cpu"],
            op_types_to_quantize=job.op_types or None,
            nodes_to_exclude=excluded or None,
            use_external_data_format=True,
            output_path=job.output,
            high_precision_dtype="fp32",
        )
    else:
        from modelopt.onnx.quantization.int4 import quantize as run

        made = run(
            job.input,
            calibration_method=job.method,
            calibration_data_reader=None if job.feeds is None else list(worker_graphs.Samples(job.feeds)),
            calibration_eps=["cpu"],
            block_size=job.group_size,
            nodes_to_exclude=excluded,
        )
        worker_graphs.save(made, job.output)
    job.step(job.method, 1, 1)


if __name__ == "__main__":
    worker_job.run(quantize)
