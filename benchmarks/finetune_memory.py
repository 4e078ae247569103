"""Peak memory of `quantcli finetune`: LoRA on a float model against QLoRA, which makes it nf4 first.

    python benchmarks/finetune_memory.py --model DIR --data FILE.jsonl --template '{phrase} {tone}' --folder DIR \
        [--steps 5] [--batch-size 4] [--seq-len 128] [--again] [--output FILE.json]

Each run is a process of its own on the CPU, in float32, and takes a few steps: memory is at its highest in the first.
It counts above what the process held when the run began, evaluation included. Losses mean nothing.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from running import describe_machine, our_environment, quantcli

RUNS = {"LoRA": ["--method", "lora"], "QLoRA": ["--method", "qlora"]}
AGAIN = {
    f"{name}, activations computed again": [*flags, "--set", "activation_checkpointing=true"]
    for name, flags in RUNS.items()
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="float checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="jsonl")
    parser.add_argument("--template", required=True, help="as --text-template")
    parser.add_argument("--folder", type=Path, required=True, help="for the results in between")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--again", action="store_true", help="also with activations computed again on the way back")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    environment = our_environment(options.folder.absolute())
    shape = {"steps": options.steps, "batch_size": options.batch_size, "seq_len": options.seq_len}
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "model": options.model.name,
        **shape,
        "machine": describe_machine(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "runs": {},
    }
    lines = ["| | peak MB | base MB | adapter MB |", "|---|---|---|---|"]
    for name, flags in (RUNS | (AGAIN if options.again else {})).items():
        output = options.folder / "result"
        shutil.rmtree(output, ignore_errors=True)
        command = ["finetune", "-m", str(options.model), "-o", str(output), "--data-files", str(options.data), *flags]
        command += ["--text-template", options.template, "--max-samples", "200", "--eval-split", "8", "--packing"]
        command += ["--max-steps", str(options.steps), "--batch-size", str(options.batch_size), "--device", "cpu"]
        command += ["--seq-len", str(options.seq_len), "--torch-dtype", "float32", "--json"]
        result = quantcli(command, environment)
        sizes = [result[key] for key in ("peak_bytes", "base_size_bytes", "adapter_size_bytes")]
        found["runs"][name] = dict(zip(("peak_bytes", "base_bytes", "adapter_bytes"), sizes, strict=True))
        lines.append(f"| {name} | {' | '.join(f'{size / 1e6:.0f}' for size in sizes)} |")
        print(lines[-1], flush=True)
        shutil.rmtree(output, ignore_errors=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
