"""llm-compressor's GPTQ: `llmcompressor_worker.py MODEL TOKENS OUTPUT SETTINGS`, see `peers.worker_command`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from measure import Measurement
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    source, tokens, output = (Path(a) for a in sys.argv[1:4])
    scheme = json.loads(sys.argv[4])
    rows = load_file(tokens)["tokens"]
    measurement = Measurement()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    measurement.mark("load")
    ids = rows.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    weights = {
        "num_bits": scheme["bits"],
        "type": "int",
        "symmetric": scheme["symmetric"],
        "strategy": "group",
        "group_size": scheme["group_size"],
    }
    if "observer" in scheme:
        weights["observer"] = scheme["observer"]
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=recipe,
        max_seq_length=rows.shape[1],
        num_calibration_samples=rows.shape[0],
        shuffle_calibration_samples=False,
    )
    measurement.mark("solve")
    model.save_pretrained(output / "model", save_compressed=True)
    measurement.mark("save")
    measurement.done(output, version=version("llmcompressor"), torch=torch.__version__, settings=weights)


if __name__ == "__main__":
    main()
