"""GPTQModel on a checkpoint: gptq and awq."""

import numpy as np
import worker_job


def quantize(job):
    """Quantizes and stores it."""
    from gptqmodel import GPTQModel, QuantizeConfig

    values = {"bits": job.bits, "group_size": job.group_size, "sym": job.symmetric, "device": job.device}
    if job.method == "gptq":
        values |= {"damp_percent": job.settings["damp_percent"], "desc_act": job.settings["order"] == "desc_act"}
    else:
        values |= {"quant_method": "awq", "format": "gemm"}
    model = GPTQModel.load(job.input, QuantizeConfig(**values))
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(job.tokens)]
    job.step(job.method, 0, 1)
    extra = {"backend": "torch_awq"} if job.method == "awq" and job.device == "cpu" else {}
    model.quantize(rows, batch_size=job.batch_size, **extra)
    job.step(job.method, 1, 1)
    model.save(job.output)


if __name__ == "__main__":
    worker_job.run(quantize)
