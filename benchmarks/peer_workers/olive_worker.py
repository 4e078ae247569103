"""Olive's Gptq pass: `olive_worker.py MODEL TOKENS OUTPUT SETTINGS`, see `peers.worker_command`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from measure import Measurement
from olive.hardware import DEFAULT_CPU_ACCELERATOR
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch import quant_utils
from olive.passes.pytorch.gptq import Gptq
from safetensors.torch import load_file


def main() -> None:
    model, tokens, output = (Path(a) for a in sys.argv[1:4])
    scheme = json.loads(sys.argv[4])
    rows = load_file(tokens)["tokens"]
    # its data sets are named in configurations; these are the same tokens that every tool gets, one row at a time
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    quant_utils.get_calibration_dataset = lambda *_, **__: batches
    measurement = Measurement()
    handler = HfModelHandler(model_path=str(model))
    settings = {"bits": scheme["bits"], "group_size": scheme["group_size"], "sym": scheme["symmetric"]}
    quantize = create_pass_from_dict(Gptq, settings, disable_search=True, accelerator_spec=DEFAULT_CPU_ACCELERATOR)
    quantize.run(handler, str(output / "model"))
    measurement.mark("solve")
    measurement.done(output, version=version("olive-ai"), torch=torch.__version__, settings=settings)


if __name__ == "__main__":
    main()
