"""What a captured graph keeps of its checkpoint, and how fast it writes: one run, one machine.

    python benchmarks/capture.py --model DIR --quantized DIR --evaluation FILE.jsonl --output FILE.json

Captures the float model as a float32 graph and the quantized checkpoint at accuracy levels 0 (exact) and 4 (int8), then
evaluates each, and both checkpoints through our torch loader, on the same text. Capture compares every weight of the
graph with the checkpoint's, bit for bit, and fails where one differs. Without --quantized, `--preset fast` makes one.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from running import describe_machine, evaluate, measure_rates, our_environment, quantcli

LARGEST_DIFFERENCE = 0.005
"""Share by which perplexity through the graph at level 0 may differ from the torch loader's."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="float checkpoint")
    parser.add_argument("--quantized", type=Path, help="what `quantcli quantize` made of it")
    parser.add_argument("--evaluation", type=Path, required=True, help="jsonl with a field text")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--work", type=Path, help="folder for the graphs; default: a temporary one")
    options = parser.parse_args(arguments)
    work = (options.work or Path(tempfile.mkdtemp(prefix="quantcli-capture-"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    environment = our_environment(work)
    model = options.model.absolute()
    machine = describe_machine()
    if machine["load_average"] > 0.5:
        print(f"the machine is busy (load {machine['load_average']:.1f}): times will mislead", file=sys.stderr)
    machine["rates"] = measure_rates(environment)
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "model": model.name, "machine": machine, "runs": {}}
    try:
        quantized = options.quantized
        if quantized is None:
            quantized = work / "quantized"
            command = ["quantize", "-m", str(model), "-o", str(quantized), "--preset", "fast", "--sym", "--json"]
            quantcli(command, environment)
        graphs = (
            ("float32 graph", model, ["--precision", "fp32"]),
            ("quantized graph, level 0", quantized, ["--accuracy-level", "0"]),
            ("quantized graph, level 4", quantized, ["--accuracy-level", "4"]),
        )
        folders = {"float checkpoint, torch": model, "quantized checkpoint, torch": quantized.absolute()}
        captures: dict[str, Any] = {}
        for number, (label, source, more) in enumerate(graphs):
            print(f"{time.strftime('%H:%M:%S')} capturing: {label}", flush=True)
            folders[label] = work / f"graph-{number}"
            command = ["capture-onnx-graph", "-m", str(source.absolute()), "-o", str(folders[label]), "--json", *more]
            captures[label] = quantcli(command, environment)
        lines = ["| | size MB | perplexity | KL | top-1 | prefill tok/s | decode tok/s |", "|---" * 7 + "|"]
        for label, folder in folders.items():
            print(f"{time.strftime('%H:%M:%S')} evaluating: {label}", flush=True)
            figures = evaluate(
                folder, model, options.evaluation, options.windows, options.seq_len, environment, speed=True
            )
            found["runs"][label] = {"capture": captures.get(label), "figures": figures}
            cells = (
                label,
                f"{figures['size_bytes'] / 1e6:.1f}",
                f"{figures['perplexity']:.3f}",
                f"{figures['kl_mean']:.4f}",
                f"{figures['top1_agreement']:.1%}",
                f"{figures['prefill_tokens_per_second']:.0f}",
                f"{figures['decode_tokens_per_second']:.1f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        torch_perplexity = found["runs"]["quantized checkpoint, torch"]["figures"]["perplexity"]
        difference = found["runs"]["quantized graph, level 0"]["figures"]["perplexity"] / torch_perplexity - 1
        found["level_0_over_torch"] = difference
        print("\n" + "\n".join(lines))
        print(f"\nperplexity through the graph at level 0: {difference:+.3%} of the torch loader's")
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if abs(difference) > LARGEST_DIFFERENCE:
        raise SystemExit(f"that is more than {LARGEST_DIFFERENCE:.1%}")


if __name__ == "__main__":
    main()
