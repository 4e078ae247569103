"""Decode speed with an adapter, relative to the base alone: an int4 graph, with and without places for adapters.

    python benchmarks/adapter_speed.py --model DIR --output benchmarks/results/adapter_speed.json

The variants take turns within every repeat, and each repeat gives one ratio to the base's own time in it: a machine
that grows slower meanwhile slows all of them. Processor seconds stand beside, for machines that others use too.
Adapters are random: their values do not matter to the time.
"""

import argparse
import io
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from quantcli.evaluate.genai_model import GenaiModel
from quantcli.finetune.lora import add_lora, save_lora
from quantcli.models.load import load
from quantcli.options import CaptureOptions, GenerateAdapterOptions, QuantizeOptions
from quantcli.pipelines import capture, generate_adapter, quantize
from running import describe_machine

_DEMO = Path.home() / ".cache" / "quantcli" / "demo" / "smollm2-135m-instruct"
_PROMPT_TOKENS = 32
# rank, linears (none: all)
ADAPTERS: Mapping[str, tuple[int, Sequence[str]]] = {
    "rank 8": (8, ()),
    "rank 16": (16, ()),
    "rank 8, q and v": (8, ("q_proj", "v_proj")),
}
_FEW = "rank 8, q and v"
_BASE, _BUILDER = "base alone", "model builder's own int4 base"


def main() -> None:
    """Makes the folders, or takes those of an earlier run, measures and prints a table."""
    args = _arguments()
    work = args.work or Path(tempfile.mkdtemp(prefix="quantcli-adapter-speed-"))
    try:
        folders = _make(args.model, work, args.accuracy_level)
        for folder in folders:
            _set_threads(folder / "model" / "genai_config.json", args.threads)
        variants = _variants(*(folder / "model" for folder in folders))
        if args.builder:
            variants |= _builder_variants(args.model, work, args.threads)
        results = _measure(variants, args.tokens, args.repeats)
        machine = describe_machine() | {"threads": args.threads}
        said = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "tokens": args.tokens, "variants": results}
        _print(said)
        if args.output is not None:
            args.output.write_text(json.dumps(said, indent=1) + "\n")
    finally:
        if args.work is None:
            shutil.rmtree(work)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", type=Path, default=_DEMO, help="float checkpoint")
    parser.add_argument("--work", type=Path, help="folder for what is made; kept, and used again")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each turn writes")
    parser.add_argument("--repeats", type=int, default=9, help="turns of every variant")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; default: its own choice")
    parser.add_argument("--accuracy-level", type=int, default=0, help="of MatMulNBits, 0 or 4")
    parser.add_argument("--builder", action="store_true", help="also the graphs that the model builder makes by itself")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def _make(model: Path, work: Path, level: int) -> tuple[Path, Path, Path]:
    """The captured int4 base, the same with places for adapters everywhere, and where q and v need them."""
    quantized, base = work / "Q", work / f"base-{level}"
    everywhere, few = work / f"adapted-{level}", work / f"adapted-few-{level}"
    if not quantized.exists():
        quantize.run(QuantizeOptions(str(model), quantized, algorithm="rtn", group_size=64))
    if not base.exists():
        # a head of 4 bits, as the builder makes it: a float one takes half of the time, and would hide the rest
        capture.run(CaptureOptions(str(quantized), base, accuracy_level=level, lm_head_bits=4))
    for name, (rank, targets) in ADAPTERS.items():
        folder = work / _file_name(name)
        if not folder.exists():
            torch.manual_seed(0)
            adapter = add_lora(load(quantized), r=rank, alpha=rank, target_modules=targets)
            for parameter in (p for n, p in adapter.named_parameters() if "lora_B" in n):
                parameter.data = 1e-3 * torch.randn_like(parameter)
            save_lora(adapter, folder)
    if not everywhere.exists():
        words = tuple(f"{_file_name(name)}={work / _file_name(name)}" for name in ADAPTERS)
        generate_adapter.run(GenerateAdapterOptions(str(base), everywhere, words))
    if not few.exists():
        generate_adapter.run(GenerateAdapterOptions(str(base), few, (str(work / _file_name(_FEW)),), only_adapted=True))
    return base, everywhere, few


def _file_name(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def _set_threads(path: Path, threads: int | None) -> None:
    config = json.loads(path.read_text())
    options = config["model"]["decoder"].setdefault("session_options", {})
    options.pop("intra_op_num_threads", None)
    if threads is not None:
        options["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config))


def _variants(base: Path, everywhere: Path, few: Path) -> dict[str, GenaiModel]:
    found = {_BASE: GenaiModel(base), "base with places, no adapter": GenaiModel(everywhere)}
    found |= {name: GenaiModel(everywhere, _file_name(name)) for name in ADAPTERS}
    found["places for q and v only, no adapter"] = GenaiModel(few)
    return found | {f"places for q and v only, {_FEW}": GenaiModel(few, _file_name(_FEW))}


def _builder_variants(model: Path, work: Path, threads: int | None) -> dict[str, GenaiModel]:
    """Int4 graphs of the model builder, its own LoRA products in them, lifted to inputs: the usual way."""
    adapter = work / "builder-rank-8"
    if not adapter.exists():
        save_lora(add_lora(load(model), r=8, alpha=8), adapter)
    base, built_in, lifted = (work / f"builder-{name}" for name in ("base", "built-in", "lifted"))
    if not base.exists():
        _run_builder(model, base)
    if not built_in.exists():
        layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        linears = [f"attn/{n}_proj" for n in "qkvo"] + [f"mlp/{n}_proj" for n in ("gate", "up", "down")]
        nodes = [
            f"/model/layers.{number}/{linear}/lora_{part}/MatMul"
            for number in range(layers) for linear in linears for part in "AB"
        ]  # fmt: skip
        _run_builder(model, built_in, f"adapter_path={adapter}", f"nodes_to_exclude={','.join(nodes)}")
    if not lifted.exists():
        generate_adapter.run(GenerateAdapterOptions(str(built_in), lifted))
    for folder in (base, lifted / "model"):
        _set_threads(folder / "genai_config.json", threads)
    return {_BUILDER: GenaiModel(base), f"{_BUILDER}, rank 8": GenaiModel(lifted / "model", "adapter")}


def _run_builder(model: Path, target: Path, *extra: str) -> None:
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime_genai.models import builder

        given = (str(model), str(target), "int4", "cpu", str(target / ".cache"))
        options = builder.parse_extra_options(None, *given, ["hf_token=false", *extra])
        builder.create_model(None, *given, **options)


def _measure(variants: Mapping[str, GenaiModel], tokens: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Milliseconds per token of each variant, with the median of its ratios to its base."""
    prompt = torch.arange(3, 3 + _PROMPT_TOKENS)
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        names = list(variants)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            spent = _decode(variants[name], prompt, tokens)
            if repeat:  # the first warms up
                turns[name].append(spent)
    results = {}
    for name, spent in turns.items():
        base = turns[_BUILDER if name.startswith(_BUILDER) else _BASE]
        ratios = [a / b for (a, _), (b, _) in zip(base, spent, strict=True)]
        results[name] = {
            "tokens_per_second": 1 / statistics.median(w for w, _ in spent),
            "speed_ratio": statistics.median(ratios),
            "speed_ratio_spread": statistics.quantiles(ratios, n=4, method="inclusive")[::2] if repeats > 1 else None,
            "fastest_turn_ms_per_token": 1000 * min(w for w, _ in spent),
            "cpu_ms_per_token": 1000 * statistics.median(c for _, c in spent),
        }
    return results


def _decode(model: GenaiModel, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Wall and processor seconds per token."""
    model.start(prompt, tokens + 1)
    model.step()  # the prompt's own answer: the model has not run on a new token yet
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(tokens):
        model.step()
    return (time.perf_counter() - begin) / tokens, (time.process_time() - cpu) / tokens


def _print(said: Mapping[str, Any]) -> None:
    print(f"{said['date']}, {said['machine']}")
    print("| variant | tokens/s | speed, of its base | fastest turn, ms/token | CPU ms/token |\n|---|---|---|---|---|")
    for name, row in said["variants"].items():
        low, high = row["speed_ratio_spread"] or (row["speed_ratio"],) * 2
        print(
            f"| {name} | {row['tokens_per_second']:.1f} | {row['speed_ratio']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {row['fastest_turn_ms_per_token']:.2f} | {row['cpu_ms_per_token']:.2f} |"
        )


if __name__ == "__main__":
    main()
