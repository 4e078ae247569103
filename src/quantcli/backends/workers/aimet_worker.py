"""AIMET on a graph."""

import onnx
import worker_graphs
import worker_job

_REFINED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def quantize(job):
    """A simulation of integers, refined where the method does, written as QuantizeLinear and DequantizeLinear."""
    import aimet_onnx
    from aimet_onnx import quantsim

    samples = list(worker_graphs.Samples(job.feeds))
    settings = job.settings
    kind = settings["activation_type"]
    sign = "unsigned" if kind.startswith("u") else "signed"
    model = onnx.load(job.input)
    sim = quantsim.QuantizationSimModel(
        model,
        param_type=f"int{job.bits}",
        activation_type=kind.removeprefix("u"),
        quant_scheme=settings["quant_scheme"],
        config_file="default",
        providers=["CPUExecutionProvider"],
    )
    job.step(job.method, 0, 3)
    for name in job.excluded:
        _leave(sim, name)
    if job.method == "lpbq":
        quantsim.set_grouped_blockwise_quantization_for_weights(
            sim,
            ("Gemm", "MatMul", "Conv"),
            bitwidth=job.bits,
            decompressed_bw=8,
            block_size=job.group_size,
            nodes_to_exclude=job.excluded,
        )
    elif job.method == "seqmse":
        aimet_onnx.apply_seq_mse(sim, samples, num_candidates=settings["num_candidates"], nodes_to_exclude=job.excluded)
    elif job.method == "adaround":
        names = [node.name for node in model.graph.node if node.op_type in _REFINED and node.name not in job.excluded]
        aimet_onnx.apply_adaround(sim, samples, settings["num_iterations"], nodes_to_include=names)
    job.step(job.method, 1, 3)
    sim.compute_encodings(samples)
    job.step(job.method, 2, 3)
    worker_graphs.save(sim.to_onnx_qdq(prequantize_constants=True, force_activation_as=sign), job.output)
    job.step(job.method, 3, 3)


def _leave(sim, name):
    """No grids on a node: neither its weight's nor its output's."""
    for operator in sim.connected_graph.get_all_ops().values():
        if operator.name == name:
            inputs, outputs, parameters = sim.get_op_quantizers(operator)
            for found in (*inputs, *outputs, *parameters.values()):
                found.enabled = False


if __name__ == "__main__":
    worker_job.run(quantize)
