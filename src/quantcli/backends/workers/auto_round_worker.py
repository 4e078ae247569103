"""AutoRound on a checkpoint."""

import numpy as np
import torch
import worker_job


def quantize(job):
    """Learns the rounding, stored as auto_gptq where the grid is symmetric, else as auto_awq."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job.input, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.input)
    tokens = torch.from_numpy(np.load(job.tokens))
    batch = min(job.settings["batch_size"], len(tokens))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
    tuner = AutoRound(
        model,
        tokenizer,
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        iters=job.settings["iters"],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=batch,
        dataset=rows,
        device_map=job.device,
        seed=job.seed,
        enable_torch_compile=False,  # it costs minutes on a CPU, and saves seconds
    )
    blocks = model.config.num_hidden_layers
    job.step("training", 0, blocks)
    _follow(tuner, job, blocks)
    tuner.quantize()
    tuner.save_quantized(job.output, format="auto_gptq" if job.symmetric else "auto_awq")


def _follow(tuner, job, blocks):
    """Each block that it finishes as a step of ours."""
    inner = getattr(tuner, "_quantize_block", None)
    if inner is None:
        return
    done = [0]

    def counted(*args, **kwargs):
        found = inner(*args, **kwargs)
        done[0] += 1
        job.step("training", done[0], blocks)
        return found

    tuner._quantize_block = counted


if __name__ == "__main__":
    worker_job.run(quantize)
