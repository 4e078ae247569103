"""Speed, memory and quality of `quantcli quantize`, side by side with peers: one model, one text, one machine, one run.

    python benchmarks/speed.py --model DIR --calibration FILE.jsonl --evaluation FILE.jsonl \
        --only ours,gptqmodel,llmcompressor,olive --peers-folder DIR --output benchmarks/results/speed.json

Everything runs one after the other, each in a process of its own, and every tool gets the same tokens.
docs/benchmarks.md says what each column means.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peer_results import readable_folder
from peers import PEERS, peer_environment, peer_python, worker_command
from running import (
    cost_values,
    describe_machine,
    evaluate,
    measure_rates,
    our_command,
    our_environment,
    run_measured,
    take_demo,
    write_tiny_model,
)

_CORRECT = {"correct_earlier": True}
_ASYM = {"symmetric": False}
# name: fields of QuantizeOptions beyond bits, group size and a symmetric grid
OURS: Mapping[str, Mapping[str, Any]] = {
    "rtn": {"algorithm": "rtn"},
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced"},
    "best": {"preset": "best"},
    "balanced-correct": {"preset": "balanced"} | _CORRECT,
    "best-correct": {"preset": "best"} | _CORRECT,
    "fast-asym": {"preset": "fast"} | _ASYM,
    "balanced-asym": {"preset": "balanced"} | _ASYM,
    "best-asym": {"preset": "best"} | _ASYM,
    "best-asym-correct": {"preset": "best"} | _ASYM | _CORRECT,
}
# peers' other settings: what their worker gets beside bits, group size and symmetry
PEER_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in PEERS},
    "llmcompressor-asym-mse": ("llmcompressor", {"symmetric": False, "observer": "memoryless_mse"}),
}
GROUPS = {"ours": ("fast", "balanced", "best"), "peers": tuple(PEERS)}
# linears of one input: they share a Hessian
_SHARED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
_WITHOUT_TEXT = ("rtn", "fast", "fast-asym")


@dataclass
class Bench:
    """One run of everything, and what it found."""

    model: Path
    calibration: Path
    evaluation: Path
    peers_folder: Path
    work: Path
    tokens: Path
    scheme: dict[str, Any]
    rows: int
    seq_len: int
    windows: int
    threads: int | None
    keep: bool
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Of our own processes."""
        return our_environment(self.work, self.threads)

    def run(self, name: str) -> dict[str, Any]:
        """Quantizes with one tool, then evaluates what it wrote."""
        output = self.work / "results" / name
        if name in OURS:
            settings = self.scheme | dict(OURS[name])
            data = None if name in _WITHOUT_TEXT else self.calibration
            if data is not None:
                settings["calibration"] = {"num_samples": self.rows, "seq_len": self.seq_len}
            command, environment = our_command(self.model, data, output, settings), self.environment
            label, version = f"quantcli {name}", "version"
        else:
            peer_name, more = PEER_VARIANTS[name]
            peer = PEERS[peer_name]
            python = peer_python(self.peers_folder, peer_name)
            if not python.exists():
                return {"label": peer.label, "skipped": f"not installed: peers.py install {peer_name}"}
            environment = peer_environment(peer, self.threads)
            command = worker_command(python, peer, self.model, self.tokens, output, self.scheme | dict(more))
            label, version = peer.label + (" asym mse" if more else ""), "version"
        cost = run_measured(command, environment, self.work / "logs" / f"{name}.log")
        if cost.exit_code:
            last = Path(cost.log).read_text(errors="replace")[-1500:]
            return {"label": label, "failed": f"exit {cost.exit_code}: {last}"}
        report = json.loads((output / "report.json").read_text())
        folder = output / "quantcli"
        if name not in OURS:
            folder = readable_folder(output, self.model, self.work / "dequantized")
        quality = evaluate(folder, self.model, self.evaluation, self.windows, self.seq_len, self.environment)
        if not self.keep:
            shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(self.work / "dequantized", ignore_errors=True)
        chosen = ("perplexity", "reference_perplexity", "kl_mean", "kl_standard_error", "top1_agreement", "tokens")
        return {
            "label": label,
            "version": report.pop(version),
            "process": cost_values(cost),
            "report": report,
            "quality": {key: quality[key] for key in chosen},
        }


def write_tokens(bench: Bench) -> None:
    """The very rows that `quantcli quantize --data` takes, as a file for all."""
    from safetensors.torch import save_file

    from quantcli.data.calibration import calibration_rows
    from quantcli.options import CalibrationOptions
    from quantcli.progress import Silent

    options = CalibrationOptions(str(bench.calibration), num_samples=bench.rows, seq_len=bench.seq_len)
    found = calibration_rows(options, bench.model, model_digest="", progress=Silent())
    if found.shortfall:
        raise SystemExit(f"{bench.calibration} is {found.shortfall} rows short of {bench.rows}")
    save_file({"tokens": found.tokens}, bench.tokens)


def compile_kernels(bench: Bench) -> dict[str, float]:
    """Quantizes a tiny model twice: what the first run takes longer is compilation, done once per machine."""
    folder = bench.work / "tiny"
    write_tiny_model(folder)
    seconds = []
    for name in ("first", "second"):
        total = 0.0
        for symmetric in (True, False):
            settings = {"preset": "best", "correct_earlier": True, "group_size": 32, "symmetric": symmetric}
            settings |= {"calibration": {"num_samples": 16, "seq_len": 32}}
            output = bench.work / f"{name}-{symmetric}"
            command = our_command(folder, folder / "text.jsonl", output, settings)
            cost = run_measured(command, bench.environment, bench.work / "logs" / f"tiny-{name}-{symmetric}.log")
            if cost.exit_code:
                raise SystemExit(f"warm-up failed: {Path(cost.log).read_text()[-2000:]}")
            total += cost.wall_seconds
        seconds.append(total)
    return {"first_seconds": seconds[0], "second_seconds": seconds[1], "compile_seconds": seconds[0] - seconds[1]}


def count_flops(model: Path, rows: int, seq_len: int) -> dict[str, float]:
    """What the work must take at least, from the shapes: each part once.

    T tokens; a linear is [N, K]; linears of one input share a Hessian and a factor. forward: 2 T N K, and scores and
    mixing of causal attention. hessians: T K^2, a symmetric product. factors: 2/3 K^3, Cholesky and a triangular
    inverse. feedback: N K^2, each column's error into those that follow. sweep: 2 N K^2, one sweep of coordinate
    descent; refit: the same.
    """
    from quantcli.models.layout import find_layout, weight_shape
    from quantcli.models.skeleton import build_skeleton

    skeleton = build_skeleton(model)
    config = skeleton.config.get_text_config()
    layout, tokens = find_layout(skeleton), rows * seq_len
    parts = dict.fromkeys(("forward", "hessians", "factors", "feedback", "sweep"), 0.0)
    seen: set[tuple[str, int]] = set()
    for name in layout.linears:
        n, k = weight_shape(skeleton.get_submodule(name))
        parts["forward"] += 2.0 * tokens * n * k
        parts["feedback"] += 1.0 * n * k * k
        parts["sweep"] += 2.0 * n * k * k
        parent, _, leaf = name.rpartition(".")
        kin = next((i for i, shared in enumerate(_SHARED) if leaf in shared), None)
        key = (parent, kin) if kin is not None else (name, 0)
        if key not in seen:
            seen.add(key)
            parts["hessians"] += 1.0 * tokens * k * k
            parts["factors"] += 2 / 3 * k**3
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or (config.hidden_size // max(heads, 1)))
    parts["forward"] += len(layout.blocks) * 2.0 * tokens * seq_len * width  # half of 4 T S width: it is causal
    return parts


def needed_flops(name: str, parts: Mapping[str, float]) -> float | None:
    """The least that a run of ours must compute; None where it looks at no text."""
    if name in _WITHOUT_TEXT:
        return None
    total = parts["forward"] + parts["hessians"] + parts["factors"] + parts["feedback"]
    if name.startswith("best"):
        total += 4 * parts["sweep"]  # two sweeps, and a refit before and after them
    if name.endswith("correct"):
        total += parts["forward"] + 2 * parts["hessians"]  # the float stream, and a full cross product
    return total


def table(found: Mapping[str, Any]) -> str:
    """The results as a markdown table."""
    heads = ("tool", "seconds", "process wall / CPU s", "peak GB (+baseline)", "KL", "perplexity", "top-1", "of bound")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    rate = found["machine"]["rates"]["float32_2048"]
    for run in found["runs"].values():
        if "quality" not in run:
            why = run.get("skipped") or run["failed"].strip().splitlines()[-1]
            lines.append(f"| {run['label']} | {why} |" + " |" * (len(heads) - 2))
            continue
        report, process, quality = run["report"], run["process"], run["quality"]
        needed = run.get("needed_flops")
        share = f"{needed / rate / report['solve_seconds']:.0%}" if needed else "-"
        cells = (
            run["label"],
            f"{report['solve_seconds']:.1f}",
            f"{process['wall_seconds']:.0f} / {process['cpu_seconds']:.0f}",
            f"{report['peak_above_baseline_bytes'] / 1e9:.2f} (+{report['baseline_bytes'] / 1e9:.2f})",
            f"{quality['kl_mean']:.4f} ± {quality['kl_standard_error'] or 0:.4f}",
            f"{quality['perplexity']:.2f}",
            f"{quality['top1_agreement']:.1%}",
            share,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _names(text: str) -> list[str]:
    names: list[str] = []
    for word in text.split(","):
        names += GROUPS.get(word, (word,))
    known = {*OURS, *PEER_VARIANTS}
    if unknown := [n for n in names if n not in known]:
        raise SystemExit(f"unknown run {unknown[0]!r}; known: {', '.join((*GROUPS, *sorted(known)))}")
    return list(dict.fromkeys(names))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="float checkpoint; default: the demo model")
    parser.add_argument("--calibration", type=Path, help="jsonl with a field text; default: the demo text")
    parser.add_argument("--evaluation", type=Path, help="other text to judge by; default: the demo text")
    parser.add_argument("--only", default="ours,peers", help="names, or the groups ours and peers")
    parser.add_argument("--peers-folder", type=Path, default=Path(".peers"), help="where peers.py installed them")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asym", action="store_true", help="asymmetric grids for all runs that do not say otherwise")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of seq-len tokens")
    parser.add_argument("--threads", type=int, help="default: as each tool chooses")
    parser.add_argument("--work", type=Path, help="folder for results in between; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="keep the quantized models, in --work")
    options = parser.parse_args(arguments)
    if options.keep and options.work is None:
        parser.error("--keep needs --work")
    if None in (options.model, options.calibration, options.evaluation):
        take_demo(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    names = _names(options.only)
    scheme = {"bits": options.bits, "group_size": options.group_size, "symmetric": not options.asym}
    work = (options.work or Path(tempfile.mkdtemp(prefix="quantcli-speed-"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        options.model.absolute(), options.calibration.absolute(), options.evaluation.absolute(),
        options.peers_folder.absolute(), work, work / "tokens.safetensors", scheme, options.rows, options.seq_len,
        options.windows, options.threads, options.keep,
    )  # fmt: skip
    try:
        machine = describe_machine()
        if machine["load_average"] > 0.5:
            print(f"the machine is busy (load {machine['load_average']:.1f}): times will mislead", file=sys.stderr)
        machine["rates"] = measure_rates(bench.environment)
        parts = count_flops(bench.model, bench.rows, bench.seq_len)
        write_tokens(bench)
        found: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "model": bench.model.name,
            "scheme": scheme,
            "calibration": {"rows": bench.rows, "seq_len": bench.seq_len},
            "machine": machine,
            "flops": parts,
            "runs": {},
        }
        print(f"matrix products: {machine['rates']['float32_2048'] / 1e9:.0f} GFLOP/s in float32", flush=True)
        print("work in TFLOP: " + ", ".join(f"{k} {v / 1e12:.2f}" for k, v in parts.items()), flush=True)
        if any(name in OURS for name in names):
            found["compilation"] = compile_kernels(bench)
            print(f"kernels compiled in {found['compilation']['compile_seconds']:.1f} s", flush=True)
        for name in names:
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            found["runs"][name] = bench.run(name) | {
                "needed_flops": needed_flops(name, parts) if name in OURS else None
            }
            _write(options.output, found)
        machine["rates_after"] = measure_rates(bench.environment)
        _write(options.output, found)
        print(f"\n{table(found)}\n")
        after = machine["rates_after"]["float32_2048"] / machine["rates"]["float32_2048"]
        if abs(after - 1) > 0.1:
            print(f"the matrix-product rate changed to {after:.0%} during the run: something else was running")
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


def _write(path: Path | None, found: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
