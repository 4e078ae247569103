"""GPTQModel's GPTQ: `gptqmodel_worker.py MODEL TOKENS OUTPUT SETTINGS`, see `peers.worker_command`."""

import json
import sys
from pathlib import Path

import gptqmodel
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from measure import Measurement
from safetensors.torch import load_file


def main() -> None:
    source, tokens, output = (Path(a) for a in sys.argv[1:4])
    scheme = json.loads(sys.argv[4])
    rows = load_file(tokens)["tokens"]
    measurement = Measurement()
    settings = {"bits": scheme["bits"], "group_size": scheme["group_size"], "sym": scheme["symmetric"]}
    # float32 as in the checkpoint: on a processor without bfloat16 instructions its default would take hours
    model = GPTQModel.load(str(source), QuantizeConfig(**settings), device="cpu", dtype=torch.float32)
    measurement.mark("load")
    batches = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(batches, batch_size=1)
    measurement.mark("solve")
    model.save(str(output / "model"))
    measurement.mark("save")
    measurement.done(output, version=gptqmodel.__version__, torch=torch.__version__, settings=settings)


if __name__ == "__main__":
    main()
