"""AutoGPTQ on a checkpoint; on CUDA alone."""

import numpy as np
import torch
import worker_job


def quantize(job):
    """Quantizes and stores it."""
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    chosen = BaseQuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        damp_percent=job.settings["damp_percent"],
        desc_act=job.settings["order"] == "desc_act",
    )
    model = AutoGPTQForCausalLM.from_pretrained(job.input, chosen)
    rows = torch.from_numpy(np.load(job.tokens))
    job.step(job.method, 0, 1)
    model.quantize(
        [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows],
        batch_size=job.batch_size,
    )
    job.step(job.method, 1, 1)
    model.save_quantized(job.output, use_safetensors=True)


if __name__ == "__main__":
    worker_job.run(quantize)
