"""Memory and time of `quantcli quantize` on a checkpoint with the shape of Llama-3-8B and random weights.

    python benchmarks/memory.py --tokenizer DIR --calibration FILE.jsonl --folder DIR [--layers 4] --output FILE.json

Writes the checkpoint shard by shard (16 GB with all 32 layers, bfloat16, weights drawn from normal(0, 0.02); the
tokenizer is any other model's with a smaller vocabulary), then runs `--preset fast` and `balanced` with 16 rows of 512
tokens, each in a process of its own. What is measured is cost: with random weights errors mean nothing.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from running import cost_values, describe_machine, measure_rates, our_command, our_environment, run_measured

GIB = 1 << 30
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
PRESETS = ("fast", "balanced", "best")


def checkpoint_bytes(layers: int) -> int:
    """Size of the weights."""
    return 2 * (layers * (sum(n * k for n, k in SHAPES.values()) + 2 * 4096) + 2 * 128256 * 4096 + 4096)


def make_checkpoint(folder: Path, layers: int, tokenizer: Path) -> None:
    """Writes one shard per layer and one for the rest; kept where it is already whole."""
    done = folder / "model.safetensors.index.json"
    if done.is_file() and json.loads(done.read_text())["metadata"].get("layers") == layers:
        return
    import torch
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape).normal_(0, 0.02, generator=generator).bfloat16()

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}.weight": random(*shape) for name, shape in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(4096, dtype=torch.bfloat16)
        write(layer, tensors)
        print(f"\rlayer {layer + 1} of {layers}", end="", flush=True)
    print()
    rest = {"model.embed_tokens.weight": random(128256, 4096), "lm_head.weight": random(128256, 4096)}
    write(layers, rest | {"model.norm.weight": torch.ones(4096, dtype=torch.bfloat16)})
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges")):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=1))
    index = {"metadata": {"total_size": checkpoint_bytes(layers), "layers": layers}, "weight_map": places}
    done.write_text(json.dumps(index, indent=1))


def depth(seconds: Sequence[float]) -> dict[str, float]:
    """Whether a block costs the same at any depth: the second quarter of the blocks against the last.

    The first blocks are left out: they wait for kernels and for the file cache.
    """
    if not seconds:
        return {}
    quarter = max(1, len(seconds) // 4)
    early = statistics.median(seconds[quarter : 2 * quarter] or seconds)
    late = statistics.median(seconds[-quarter:])
    return {
        "median": statistics.median(seconds),
        "lowest": min(seconds),
        "highest": max(seconds),
        "late_over_early": late / early,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint and the results in between")
    parser.add_argument("--tokenizer", type=Path, required=True, help="model folder whose tokenizer is borrowed")
    parser.add_argument("--calibration", type=Path, required=True, help="jsonl with a field text")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--presets", default="fast,balanced")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint for the next run")
    options = parser.parse_args(arguments)
    names = options.presets.split(",")
    if unknown := set(names) - set(PRESETS):
        parser.error(f"unknown preset {unknown.pop()!r}; known: {', '.join(PRESETS)}")
    if options.layers < 1:
        parser.error("--layers must be 1 or more")
    folder = options.folder.absolute()
    model = folder / f"llama-8b-{options.layers}"
    folder.mkdir(parents=True, exist_ok=True)
    # the checkpoint, and a quantized one: under a third of the blocks, embedding and head as they were
    needed = checkpoint_bytes(options.layers) // 3 + 2 * GIB + 4 * 128256 * 4096
    needed += 0 if (model / "model.safetensors.index.json").is_file() else checkpoint_bytes(options.layers)
    free = shutil.disk_usage(folder).free
    if free < needed:
        parser.error(f"{needed / 1e9:.0f} GB of disk are needed in {folder}, {free / 1e9:.0f} GB are free")
    environment = our_environment(folder)
    machine = describe_machine()
    if machine["load_average"] > 0.5:
        print(f"the machine is busy (load {machine['load_average']:.1f}): times will mislead", file=sys.stderr)
    machine["rates"] = measure_rates(environment)
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "model": f"Llama-3-8B's shape, {options.layers} layers, random bfloat16",
        "parameters_bytes": checkpoint_bytes(options.layers),
        "calibration": {"rows": options.rows, "seq_len": options.seq_len},
        "machine": machine,
        "runs": {},
    }
    lines = ["| preset | seconds | peak GB above baseline | seconds per block (low / median / high) | late / early |"]
    lines.append("|---|---|---|---|---|")
    try:
        make_checkpoint(model, options.layers, options.tokenizer)
        for name in names:
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            output = folder / f"result-{name}"
            shutil.rmtree(output, ignore_errors=True)
            settings: dict[str, Any] = {"preset": name, "symmetric": True}
            if name != "fast":
                settings["calibration"] = {"num_samples": options.rows, "seq_len": options.seq_len}
            data = None if name == "fast" else options.calibration.absolute()
            cost = run_measured(our_command(model, data, output, settings), environment, folder / f"{name}.log")
            if cost.exit_code:
                last = Path(cost.log).read_text(errors="replace").strip()[-1500:]
                found["runs"][name] = {"failed": f"exit {cost.exit_code}: {last}"}
                lines.append(f"| {name} | {last.splitlines()[-1] if last else 'failed'} | | | |")
                continue
            report = json.loads((output / "report.json").read_text())
            blocks = depth(report["block_seconds"])
            found["runs"][name] = {"process": cost_values(cost), "report": report, "blocks": blocks}
            peak = report["peak_above_baseline_bytes"] / 1e9
            spread = " / ".join(f"{blocks[key]:.1f}" for key in ("lowest", "median", "highest"))
            late = f"{blocks['late_over_early']:.2f}"
            lines.append(f"| {name} | {report['solve_seconds']:.0f} | {peak:.2f} | {spread} | {late} |")
            shutil.rmtree(output, ignore_errors=True)
            if options.output is not None:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        if not options.keep:
            shutil.rmtree(model, ignore_errors=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
