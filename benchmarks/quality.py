"""Quality of every method on two models, as docs/quality.md: perplexity, KL, size, seconds, peak memory.

    python benchmarks/quality.py [--only REGEX] [--samples 16] [--results FILE.json] [--output docs/quality.md]

A cell is a model, a method and a scheme: `quantcli quantize`, then `quantcli evaluate`, each in a process of its own.
It is kept in the results file as soon as it is measured, and measured once: an interrupted benchmark continues where it
was. `--only` is searched in names such as "demo/awq,gptq/3b g64"; `--list` prints them. Methods that `quantcli
algorithms` does not list are skipped.

The models are the demo model (`make demo` fetches it) and the same function with the gain of every norm multiplied into
the linears that follow: the demo model's weights come from a 4-bit grid, where float zero points look lossless, the
folded ones lie on no grid.

A cell costs processor seconds, not wall seconds, with `--threads` threads (1 by default, which wastes none of them on
waiting): the hours that all cells take leave the rest of the machine to other work. Wall times beside peers, on a quiet
machine, are what speed.py measures.
"""

import argparse
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kept import Kept, cell_arguments, file_digest
from quality_page import write_page
from running import (
    ROOT,
    evaluate,
    quantcli,
    quantize_command,
    run_measured,
    take_demo,
    write_tiny_model,
)

FIGURES = ("perplexity", "reference_perplexity", "kl_mean", "kl_standard_error", "top1_agreement", "tokens", "windows")


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    flags: tuple[str, ...]
    """What it adds to the command line."""
    needs: tuple[str, ...]
    """Algorithms that must be there."""
    calibrates: bool = True
    """Whether it takes the calibration text."""
    schemes: tuple[str, ...] = ()
    """Schemes that it has; all where empty."""


SCHEMES: Mapping[str, tuple[str, ...]] = {
    "4b g64 asym": ("--bits", "4", "--group-size", "64"),
    "4b g64 sym": ("--bits", "4", "--group-size", "64", "--sym"),
    "4b per channel": ("--bits", "4", "--group-size", "-1"),
    "3b g64": ("--bits", "3", "--group-size", "64"),
    "2b g32": ("--bits", "2", "--group-size", "32"),
}
_ASYM = tuple(name for name in SCHEMES if not name.endswith(" sym"))
_ABLATION = ("4b g64 asym", "3b g64")
"""What a part of a method is worth."""
_BEST = ("--set", "refit=true", "--set", "sweeps=2")
METHODS: Mapping[str, Method] = {
    "rtn": Method(("-a", "rtn"), ("rtn",), calibrates=False),
    "hqq": Method(("-a", "hqq"), ("hqq",), calibrates=False),
    "hqq, float zeros": Method(("-a", "hqq", "--format", "float"), ("hqq",), calibrates=False, schemes=_ASYM),
    "hqq, float zeros, scale fitted": Method(
        ("-a", "hqq", "--format", "float", "--set", "fit_scale=true"), ("hqq",), calibrates=False, schemes=_ABLATION
    ),
    "kquant": Method(("-a", "kquant"), ("kquant",), calibrates=False),
    "nf4": Method(("-a", "nf4"), ("nf4",), calibrates=False, schemes=("4b g64 asym",)),
    "awq": Method(("-a", "awq"), ("awq", "kquant")),
    "awq,gptq": Method(("-a", "awq,gptq"), ("awq", "gptq")),
    "gptq": Method(("-a", "gptq"), ("gptq",)),
    "gptq, refit and sweeps": Method(("-a", "gptq", *_BEST), ("gptq",), schemes=_ABLATION),
    "best": Method(("--preset", "best"), ("awq", "gptq")),
    "max": Method(("--preset", "max"), ("awq", "gptq", "distill")),
    "quarot,rtn": Method(("-a", "quarot,rtn"), ("quarot", "rtn"), calibrates=False),
    "quarot,gptq": Method(("-a", "quarot,gptq"), ("quarot", "gptq")),
    "quarot,best": Method(("-a", "quarot,awq,gptq", "--preset", "best"), ("quarot", "awq", "gptq")),
    "spinquant,gptq": Method(("-a", "spinquant,gptq"), ("spinquant", "gptq")),
}
_ROTATING = ("quarot", "spinquant")
"""They fold the norms before anything else: what they make of the two models is the same."""
MIXED: Mapping[str, tuple[str, ...]] = {
    "3.5 bits": ("-a", "gptq", "--group-size", "64", "--target-bits", "3.5"),
}
"""Bits per layer by sensitivity: the page holds them against gptq's uniform 3 and 4 bits."""


@dataclass(frozen=True)
class Cell:
    """What is measured at once."""

    model: str
    method: str
    scheme: str
    flags: tuple[str, ...]
    needs: tuple[str, ...]
    calibrates: bool

    @property
    def name(self) -> str:
        """Key in the results, and what `--only` is searched in."""
        return f"{self.model}/{self.method}/{self.scheme}"


@dataclass
class Bench(Kept):
    """One run, and where it keeps what it finds."""

    models: dict[str, Path]
    calibration: Path
    evaluation: Path
    results: Path
    work: Path
    settings: dict[str, Any]
    found: dict[str, Any] = field(default_factory=dict)
    warm: set[tuple[str, ...]] = field(default_factory=set)

    def measure(self, cell: Any) -> dict[str, Any]:
        """Quantizes and evaluates; what failed says so in its own words."""
        self.compile(cell.method, cell.flags, cell.calibrates)
        model, output = self.models[cell.model], self.work / "quantized"
        shutil.rmtree(output, ignore_errors=True)
        flags, log = list(cell.flags), self.work / "log"
        if cell.calibrates:
            flags += ["--data", str(self.calibration), "--num-samples", str(self.settings["rows"])]
            flags += ["--seq-len", str(self.settings["seq_len"])]
        variables = environment(self.settings["threads"])
        cost = run_measured(quantize_command(model, output, flags), variables, log)
        if cost.exit_code:
            return {"failed": f"exit {cost.exit_code}: {log.read_text(errors='replace').strip()[-300:]}"}
        report = json.loads((output / "report.json").read_text())
        try:
            quality = evaluate(
                output,
                model,
                self.evaluation,
                self.settings["samples"],
                self.settings["seq_len"],
                variables,
                cache=self.work / "logits",
            )
        except RuntimeError as error:
            return {"failed": str(error)}
        finally:
            shutil.rmtree(output, ignore_errors=True)
        return {
            **{key: quality[key] for key in FIGURES},
            "size_bytes": report["size_bytes"],
            "bits_per_weight": report["bits_per_weight"],
            "float_result": "--format" in cell.flags,
            "cpu_seconds": cost.cpu_seconds,
            "peak_bytes": report["peak_bytes"],
            "wall_seconds": cost.wall_seconds,
        }

    def said(self, values: Mapping[str, Any]) -> str:
        """Of a cell, for the log."""
        return "KL {kl_mean:.4f}, {cpu_seconds:.0f} s".format(**values)

    def compile(self, method: str, flags: Sequence[str], calibrates: bool) -> None:
        """Runs the method on a tiny model first: kernels are compiled once per machine, not within a cell."""
        kind = (method, "--sym" if "--sym" in flags else "")
        if kind in self.warm:
            return
        self.warm.add(kind)
        tiny = self.work / "tiny"
        if not tiny.exists():
            write_tiny_model(tiny)
        text = ["--data", str(tiny / "text.jsonl"), "--num-samples", "8", "--seq-len", "32"] if calibrates else []
        output = self.work / "warm"
        run_measured(quantize_command(tiny, output, [*flags, *text]), environment(), self.work / "warm.log")
        shutil.rmtree(output, ignore_errors=True)


def environment(threads: int = 1) -> dict[str, str]:
    """Variables of all processes: this user's compiled kernels and self-written text are used again."""
    limits = {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | limits


def cells(models: Sequence[str]) -> Iterator[Cell]:
    """All of them, one model after the other."""
    for model in models:
        for name, method in METHODS.items():
            if model == "demo" and name.startswith(_ROTATING):
                continue
            for scheme, flags in SCHEMES.items():
                if not method.schemes or scheme in method.schemes:
                    yield Cell(model, name, scheme, (*method.flags, *flags), method.needs, method.calibrates)
        for name, flags in MIXED.items():
            yield Cell(model, "mixed", name, flags, ("gptq",), True)


def missing(cell: Cell, known: Mapping[str, Sequence[int]], flags: str) -> str | None:
    """Why this version cannot measure a cell; None where it can."""
    absent = [name for name in cell.needs if name not in known]
    if absent:
        return f"no {' and '.join(absent)} here"
    unknown = [flag for flag in cell.flags if flag.startswith("--") and flag not in flags]
    if unknown:
        return f"quantize has no {unknown[0]}"
    if "--bits" in cell.flags:
        bits = int(cell.flags[cell.flags.index("--bits") + 1])
        unable = [name for name in cell.needs if bits not in known[name]]
        if unable:
            return f"{unable[0]} makes no {bits} bits"
    return None


def fold_norms(source: Path, folder: Path) -> None:
    """Writes the same function with all gains 1: each norm's gain times the columns of the linears that read it.

    Raises:
        SystemExit: the folded model computes something else.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = torch.arange(100, 164)[None]
    with torch.no_grad():
        before = model(tokens).logits
        inside = model.model
        for layer in inside.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            )
            for norm, linears in readers:
                for linear in linears:
                    linear.weight.mul_(norm.weight)
                norm.weight.fill_(1)
        head = (model.lm_head.weight * inside.norm.weight).clone()  # the embedding has no gain: two matrices now
        model.lm_head.weight = torch.nn.Parameter(head)
        inside.norm.weight.fill_(1)
        model.config.tie_word_embeddings = False
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        after = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    change = float((after - before).abs().max() / before.abs().max())
    if change > 1e-4:
        raise SystemExit(f"folding the norms of {source} changed its logits by {change:.1e}")


def folded(model: Path) -> Path:
    """The folded variant of a model, made once and kept beside the demo models."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from quantcli.folder import fingerprint
    from wheel_member import demo_folder, made_from

    folder = demo_folder(f"{model.name}-folded")
    made_from(folder, fingerprint(model), inspect.getsource(fold_norms), make=lambda made: fold_norms(model, made))
    return folder


def versions() -> str:
    """Of quantcli and of what computes."""
    return ", ".join(f"{name} {version(name)}" for name in ("quantcli", "torch", "transformers", "numba"))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cell_arguments(__doc__, "quality.json", "quality.md")
    parser.add_argument("--samples", type=int, default=16, help="evaluation windows of seq-len tokens")
    parser.add_argument("--rows", type=int, default=64, help="calibration rows of seq-len tokens")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--model", type=Path, help="float checkpoint of the llama kind; default: the demo model")
    parser.add_argument("--calibration", type=Path, help="jsonl with a field text; default: the demo text")
    parser.add_argument("--evaluation", type=Path, help="other text to judge by; default: the demo text")
    options = parser.parse_args(arguments)
    if None in (options.model, options.calibration, options.evaluation):
        take_demo(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    chosen = [cell for cell in cells(("demo", "folded")) if options.only.search(cell.name)]
    if options.list:
        print("\n".join(cell.name for cell in chosen))
        return
    model = options.model.absolute()
    settings = {
        "model": model.name, "rows": options.rows, "samples": options.samples, "seq_len": options.seq_len,
        "threads": options.threads, "calibration": file_digest(options.calibration),
        "evaluation": file_digest(options.evaluation),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="quantcli-quality-") as scratch:
        models = {"demo": model, "folded": folded(model)}
        texts = options.calibration.absolute(), options.evaluation.absolute()
        bench = Bench(models, *texts, options.results, Path(scratch), settings)
        bench.open()
        known = {a["name"]: a["bits"] for a in quantcli(["algorithms", "--json"], environment())["algorithms"]}
        flags = quantize_flags()

        def write() -> None:
            write_page(options.output, bench.found, list(METHODS), list(SCHEMES))

        bench.run(chosen, options.again, versions(), write, lambda cell: missing(cell, known, flags))


def quantize_flags() -> str:
    """The help of `quantcli quantize`, which names every flag that there is."""
    command = [sys.executable, "-m", "quantcli", "quantize", "--help"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
