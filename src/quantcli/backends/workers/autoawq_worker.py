"""AutoAWQ on a checkpoint."""

import numpy as np
import torch
import worker_job


def quantize(job):
    """Scales and rounds, stored as awq gemm."""
    from awq import AutoAWQForCausalLM
    from awq.quantize import quantizer as awq_quantizer
    from transformers import AutoTokenizer

    tokens = torch.from_numpy(np.load(job.tokens))
    # it cuts its own rows out of texts; ours come as tokens already
    awq_quantizer.get_calib_dataset = lambda *_, **__: [row[None] for row in tokens]
    model = AutoAWQForCausalLM.from_pretrained(job.input, device_map="cpu", safetensors=True, low_cpu_mem_usage=False)
    tokenizer = AutoTokenizer.from_pretrained(job.input)
    blocks = len(model.get_model_layers(model.model))
    _follow(awq_quantizer, job, blocks)
    model.quantize(
        tokenizer,
        quant_config={"zero_point": True, "q_group_size": job.group_size, "w_bit": 4, "version": "GEMM"},
        max_calib_samples=len(tokens),
        max_calib_seq_len=tokens.shape[1],
        duo_scaling=job.settings["duo_scaling"],
    )
    model.save_quantized(job.output, safetensors=True)


def _follow(module, job, blocks):
    """Its bar over blocks as our steps."""

    def tqdm(items, *_, **__):
        for number, item in enumerate(items):
            job.step("quantizing", number, blocks)
            yield item
        job.step("quantizing", blocks, blocks)

    module.tqdm = tqdm


if __name__ == "__main__":
    worker_job.run(quantize)
