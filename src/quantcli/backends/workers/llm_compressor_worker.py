"""llm-compressor on a checkpoint, stored as compressed-tensors."""

import numpy as np
import worker_job


def quantize(job):
    """One shot of its modifiers."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job.input, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.input)
    arguments = {"model": model, "tokenizer": tokenizer, "recipe": _recipe(job), "output_dir": None}
    if job.tokens is not None:
        tokens = np.load(job.tokens)
        rows = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
        arguments |= {
            "dataset": Dataset.from_dict(rows),
            "num_calibration_samples": len(tokens),
            "max_seq_length": tokens.shape[1],
        }
    job.step(job.method, 0, 1)
    oneshot(**{k: v for k, v in arguments.items() if v is not None})
    job.step(job.method, 1, 1)
    model.save_pretrained(job.output, save_compressed=True)


def _recipe(job):
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    ignore = ["lm_head"]
    grid = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "channel" if job.group_size == -1 else "group",
        "group_size": None if job.group_size == -1 else job.group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": grid}}
    if job.method == "rtn":
        return QuantizationModifier(config_groups=groups, ignore=ignore)
    if job.method == "gptq":
        return GPTQModifier(config_groups=groups, ignore=ignore, dampening_frac=job.settings["damp_percent"])
    if job.method == "awq":
        from llmcompressor.modifiers.awq import AWQModifier

        return AWQModifier(config_groups=groups, ignore=ignore)
    whole = QuantizationModifier(
        targets="Linear", scheme="FP8_DYNAMIC" if job.method == "fp8" else "W8A8", ignore=ignore
    )
    if job.method != "smoothquant":
        return whole
    try:
        from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
    except ImportError:
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    return [SmoothQuantModifier(smoothing_strength=job.settings["alpha"]), whole]


if __name__ == "__main__":
    worker_job.run(quantize)
