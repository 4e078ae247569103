"""Runs workers one after the other, each in a process of its own, and says what each cost."""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers import write_tokenizer

__all__ = [
    "ROOT",
    "Cost",
    "cost_values",
    "describe_machine",
    "evaluate",
    "measure_rates",
    "our_command",
    "our_environment",
    "quantcli",
    "quantize_command",
    "run_measured",
    "take_demo",
    "write_tiny_model",
]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_RATES = """
import json, time, torch
from quantcli.models.machine import matmul_flops
def rate(size, dtype, seconds):
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    a @ b
    best, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
cpu = torch.device("cpu")
print(json.dumps({
    "quick_float32": matmul_flops(cpu), "quick_bfloat16": matmul_flops(cpu, torch.bfloat16),
    "float32_2048": rate(2048, torch.float32, 4.0), "torch": torch.__version__, "threads": torch.get_num_threads(),
}))
"""


@dataclass(frozen=True)
class Cost:
    """What a process cost from outside, start to exit."""

    wall_seconds: float
    cpu_seconds: float
    """User and system time, its children's included."""
    exit_code: int
    log: str
    """Where its output is."""


def run_measured(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Cost:
    """Runs a command and waits for it; both outputs go to the file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        begun = time.perf_counter()
        process = subprocess.Popen(command, env=dict(environment), stdout=file, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    return Cost(seconds, usage.ru_utime + usage.ru_stime, process.returncode, str(log))


def our_environment(scratch: Path, threads: int | None = None) -> dict[str, str]:
    """Variables for our own processes: compiled kernels and self-written text are made anew, in `scratch`."""
    variables = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NUMBA_CACHE_DIR": str(scratch / "numba"),
        "QUANTCLI_CACHE": str(scratch / "cache"),
    }
    if threads is not None:
        variables |= {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    return dict(variables)


def our_command(model: Path, calibration: Path | None, output: Path, settings: Mapping[str, Any]) -> list[str]:
    """The command line of `our_worker.py`."""
    data = "-" if calibration is None else str(calibration)
    return [sys.executable, str(HERE / "our_worker.py"), str(model), data, str(output), json.dumps(settings)]


def quantize_command(model: Path, output: Path, flags: Sequence[str]) -> list[str]:
    """The command line of a user."""
    return [
        sys.executable,
        "-m",
        "quantcli",
        "quantize",
        "-m",
        str(model),
        "-o",
        str(output),
        "--quiet",
        "--force",
        *flags,
    ]


def take_demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fills in what is not given of `model`, `calibration` and `evaluation`: those that `make demo` fetches."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from wheel_member import demo_folder

    text = demo_folder("wikipedia")
    options.model = options.model or demo_folder("smollm2-135m-instruct")
    options.calibration = options.calibration or text / "calibration.jsonl"
    options.evaluation = options.evaluation or text / "evaluation.jsonl"
    if not (options.model / "config.json").is_file() or not options.calibration.is_file():
        parser.error("the demo model is not there: run `make demo` first, or give --model and the texts")


def write_tiny_model(folder: Path) -> None:
    """A Llama of two small blocks with random weights, a tokenizer, and a `text.jsonl` of its words."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    words = random.Random(0)
    text = " ".join(f"w{words.randrange(3, 199)}" for _ in range(4000))
    (folder / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")


def evaluate(
    folder: Path,
    reference: Path | None,
    text: Path,
    windows: int,
    seq_len: int,
    environment: Mapping[str, str],
    speed: bool = False,
    cache: Path | None = None,
) -> dict[str, Any]:
    """`quantcli evaluate` of a folder, against the float model where one is given, whose logits `cache` keeps.

    Raises:
        RuntimeError: it failed; the message is its own.
    """
    command = ["evaluate", "-m", str(folder), "--data", str(text), "--num-samples", str(windows)]
    command += ["--seq-len", str(seq_len), "--json"]
    command += ["--reference", str(reference)] if reference is not None else []
    command += ["--reference-cache", str(cache)] if cache is not None else []
    command += [] if speed else ["--no-speed"]
    return quantcli(command, environment)


def quantcli(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs a command that prints JSON.

    Raises:
        RuntimeError: it failed; the message is its own.
    """
    command = [sys.executable, "-m", "quantcli", *arguments]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"quantcli {' '.join(arguments)}: {done.stderr.strip()[-500:]}")
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def measure_rates(environment: Mapping[str, str]) -> dict[str, Any]:
    """Matrix products a second: `quantcli.models.machine.matmul_flops`, and the best of 4 s at 2048."""
    done = subprocess.run(
        [sys.executable, "-c", _RATES], env=dict(environment), capture_output=True, text=True, check=True
    )
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, system, and how busy it is."""
    processor = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def cost_values(cost: Cost) -> dict[str, Any]:
    """For JSON."""
    values = asdict(cost)
    values.pop("log")
    return values
