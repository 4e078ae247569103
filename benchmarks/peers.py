"""The peers that `speed.py` measures beside quantcli, each in an environment of its own.

    python benchmarks/peers.py install gptqmodel|llmcompressor|olive|all --folder DIR
    python benchmarks/peers.py check   gptqmodel|llmcompressor|olive|all --folder DIR

`install` makes DIR/NAME as a virtual environment with the versions below; about 2 GB each with a CPU build of torch.
`check` makes a random Llama of two layers, lets the peer quantize it, and reads what it wrote.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PEERS", "SCHEME", "WORKERS", "Peer", "peer_environment", "peer_python", "worker_command"]

SCHEME: Mapping[str, Any] = {"bits": 4, "group_size": 64, "symmetric": True}
WORKERS = Path(__file__).resolve().parent / "peer_workers"
# torch first: what comes later must take this one, and not the newest with its CUDA packages
_TORCH = ["torch==2.13.0"]
_COMMON = ["accelerate==1.15.0", "safetensors==0.8.0", "psutil"]


@dataclass(frozen=True)
class Peer:
    """One tool, and how it is installed and run."""

    name: str
    label: str
    """As shown in tables."""
    imports: str
    """Module that must import."""
    steps: tuple[tuple[str, ...], ...]
    """Arguments of `pip install`, in order."""
    variables: tuple[tuple[str, str], ...] = ()
    """Environment variables that it runs with."""

    @property
    def worker(self) -> Path:
        """The script that quantizes with it."""
        return WORKERS / f"{self.name}_worker.py"


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "gptqmodel",
            "GPTQModel 7.6.0",
            "gptqmodel",
            (
                (*_TORCH, "numpy==2.4.6"),
                (*_COMMON, "transformers==5.23.0", "tokenizers==0.23.3", "datasets==5.2.0", "optimum", "setuptools"),
                (
                    *("threadpoolctl", "packaging", "device-smi", "protobuf==7.36.2", "pillow", "requests", "pypcre"),
                    *("logbar", "jinja2", "ninja", "maturin", "dill", "torchao==0.18.0", "defuser", "filelock"),
                ),
                # its own pin is numpy 2.2.6; it runs with 2.4
                ("--no-deps", "tokenicer"),
                ("--no-deps", "--no-build-isolation", "gptqmodel==7.6.0"),
            ),
            # one worker for each of two cores; the default starts more threads than there are cores
            (("GPTQMODEL_CPU_WORKERS", "2"),),
        ),
        Peer(
            "llmcompressor",
            "llm-compressor 0.14 GPTQ",
            "llmcompressor",
            ((*_TORCH,), (*_TORCH, *_COMMON, "llmcompressor==0.14.0.1")),
        ),
        Peer(
            "olive",
            "Olive 0.13 Gptq",
            "olive",
            (
                (*_TORCH,),
                (*_TORCH, *_COMMON, "transformers==5.23.0", "olive-ai==0.13.0", "requests", "datasets==5.2.0"),
            ),
        ),
    )
}


def peer_python(folder: Path, name: str) -> Path:
    """The interpreter of an installed peer."""
    return folder / name / "bin" / "python"


def peer_environment(peer: Peer, threads: int | None = None) -> dict[str, str]:
    """Variables for a peer's process: no hub, no progress bars, nothing of our own environment's Python paths."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **dict(peer.variables)}
    if threads is not None:
        variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return variables


def worker_command(
    python: Path, peer: Peer, model: Path, tokens: Path, output: Path, scheme: Mapping[str, Any] = SCHEME
) -> list[str]:
    """The command line of a worker.

    Args:
        python: Interpreter of the peer.
        peer: Which.
        model: Float checkpoint.
        tokens: Safetensors file with `tokens` [rows, seq_len] int64.
        output: Folder to write: model/, and report.json with seconds and memory.
        scheme: bits, group_size, symmetric, and what else the worker knows.
    """
    return [str(python), str(peer.worker), str(model), str(tokens), str(output), json.dumps(scheme)]


def install(peer: Peer, folder: Path) -> None:
    """Makes the environment; what is there already is kept."""
    home = folder / peer.name
    if not peer_python(folder, peer.name).exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = str(peer_python(folder, peer.name))
    for step in peer.steps:
        print("pip install", *step, flush=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step],
            check=True,
            env=peer_environment(peer),
        )
    # beside a CPU build of torch, the torchvision of PyPI breaks every import of transformers' models
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)


def check(peer: Peer, folder: Path) -> None:
    """Quantizes a random model of two layers and reads the result with our loader."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from peer_results import read_result

    python = peer_python(folder, peer.name)
    subprocess.run([str(python), "-c", f"import {peer.imports}"], check=True, env=peer_environment(peer, 1))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        config = LlamaConfig(
            vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(root / "float")
        write_tokenizer(root / "float")
        save_file({"tokens": torch.randint(3, 200, (8, 64))}, root / "tokens.safetensors")
        command = worker_command(python, peer, root / "float", root / "tokens.safetensors", root / "out")
        subprocess.run(command, check=True, env=peer_environment(peer, 1))
        print(json.dumps(json.loads((root / "out" / "report.json").read_text())))
        quantized = read_result(root / "out", root / "float", root / "read")
        ids = torch.randint(3, 200, (1, 32))
        with torch.no_grad():
            exact, found = model(ids).logits, quantized(ids).logits
        print(f"{peer.label}: relative error of the logits {float((found - exact).norm() / exact.norm()):.3f}")


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 200 words, for models that only need to have one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(199)} | {"<unk>": 199}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="w0", eos_token="w1", pad_token="w2"
    ).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("install", "check"))
    parser.add_argument("name", choices=(*PEERS, "all"))
    parser.add_argument("--folder", type=Path, required=True, help="where the environments are")
    options = parser.parse_args(arguments)
    for peer in PEERS.values() if options.name == "all" else [PEERS[options.name]]:
        {"install": install, "check": check}[options.action](peer, options.folder.absolute())


if __name__ == "__main__":
    main()
