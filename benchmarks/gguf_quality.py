"""GGUF files of ours beside `llama_model_quantize`'s of the same type: `gguf_quality.py --python PYTHON`.

PYTHON is an interpreter that has llama-cpp-python: it quantizes the float file and scores all files, ours too, in
llama.cpp itself. Its importance matrix is gathered on the calibration text that our gptq sees. Results are kept in
`benchmarks/results/gguf_quality.json` as they come, and written between the marks of docs/formats.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gguf_quality.json"
PAGE = ROOT / "docs" / "formats.md"
BEGIN, END = "<!-- gguf: begin -->", "<!-- gguf: end -->"
DEMO = Path.home() / ".cache" / "quantcli" / "demo"
OURS = {"kquant": ["-a", "kquant"], "gptq": ["-a", "gptq"], "best": ["--preset", "best"]}
THEIRS = ("llama.cpp", "llama.cpp, imatrix")
ROWS, LENGTH = 32, 512


def main() -> None:
    """Makes what is missing, scores everything, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True)
    parser.add_argument("--model", type=Path, default=DEMO / "smollm2-135m-instruct")
    parser.add_argument("--calibration", type=Path, default=DEMO / "wikipedia" / "calibration.jsonl")
    parser.add_argument("--text", type=Path, default=DEMO / "wikipedia" / "evaluation.jsonl")
    parser.add_argument("--work", type=Path, default=ROOT / ".demo" / "gguf")
    parser.add_argument("--types", default="q4_0,q3_k_m,q4_k_m,q5_k_m,q8_0")
    parser.add_argument("--methods", default="kquant,gptq,best")
    parser.add_argument("--windows", type=int, default=8)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    types, methods = given.types.split(","), given.methods.split(",")
    float_file = write_float(given.model, given.work / "float.gguf")
    importance = gather_importance(given.model, given.calibration, given.work / "importance.npz")
    files: dict[tuple[str, str], Path] = {}
    jobs = []
    for mix in types:
        for method in THEIRS:
            target = files[mix, method] = given.work / f"{mix}-{'imatrix' if 'imatrix' in method else 'plain'}.gguf"
            matrix = str(importance) if "imatrix" in method else None
            jobs.append({"source": str(float_file), "target": str(target), "mix": mix, "importance": matrix})
        for method in methods:
            files[mix, method] = quantize(given, mix, method)
    scored = score(given, float_file, list(files.values()), jobs)
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for (mix, method), path in files.items():
        figures = scored[str(path)] | {"size_bytes": path.stat().st_size}
        kept.setdefault(mix, {})[method] = figures
    kept["float"] = scored[str(float_file)] | {"size_bytes": float_file.stat().st_size}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    write_page(kept)


def write_float(model: Path, target: Path) -> Path:
    """The float model as a GGUF file of float32."""
    from quantcli.models.checkpoint import Checkpoint
    from quantcli.models.conversion import as_in_model
    from quantcli.models.gguf.families import family_of
    from quantcli.models.gguf.names import tensors_of
    from quantcli.models.gguf.vocabulary import read_vocabulary
    from quantcli.models.gguf.writer import GgufContent, write_gguf
    from quantcli.models.skeleton import build_skeleton

    if target.is_file():
        return target
    skeleton = build_skeleton(model)
    tensors = as_in_model(Checkpoint.open(model), skeleton)
    config = skeleton.config.get_text_config()
    family = family_of(config)
    parts = tensors_of(skeleton, family, head=None if config.tie_word_embeddings else "lm_head")
    vocabulary = read_vocabulary(model, config.vocab_size)
    write_gguf(
        target, tensors, tensors.names, {}, GgufContent(config, family, parts, vocabulary, model.name, None, "quantcli")
    )
    return target


def windows_of(model: Path, text: Path, count: int) -> list[list[int]]:
    """Runs of tokens from the beginning of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    joined = "\n\n".join(json.loads(line)["text"] for line in text.read_text().splitlines())
    ids = tokenizer(joined[: 20 * count * LENGTH]).input_ids
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(count)]


def gather_importance(model: Path, text: Path, target: Path) -> Path:
    """Mean squares of the inputs of every linear, under the names that they have in the file."""
    from transformers import AutoModelForCausalLM

    from quantcli.models.gguf.families import family_of
    from quantcli.models.gguf.names import tensors_of

    if target.is_file():
        return target
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    config = net.config.get_text_config()
    parts = tensors_of(net, family_of(config), head=None if config.tie_word_embeddings else "lm_head")
    names = {part.sources[0].removesuffix(".weight"): part.name for part in parts if len(part.sources) == 1}
    sums: dict[str, Any] = {}

    def add(name: str, inputs: torch.Tensor) -> None:
        squares = inputs.reshape(-1, inputs.shape[-1]).square().mean(0)
        sums[name] = sums.get(name, 0) + squares

    for path, module in net.named_modules():
        if isinstance(module, torch.nn.Linear) and path in names:
            module.register_forward_pre_hook(lambda _, inputs, name=names[path]: add(name, inputs[0]))
    with torch.inference_mode():
        for tokens in windows_of(model, text, ROWS):
            net.model(torch.tensor([tokens]))
    np.savez(target, **{name: (values / ROWS).numpy() for name, values in sums.items()})
    return target


def quantize(given: argparse.Namespace, mix: str, method: str) -> Path:
    """A file of ours."""
    folder = given.work / f"{mix}-{method}"
    if not folder.is_dir():
        text = ["--data", str(given.calibration), "--num-samples", str(ROWS), "--seq-len", str(LENGTH)]
        command = [sys.executable, "-m", "quantcli", "quantize", "-m", str(given.model), "-o", str(folder)]
        command += ["--format", "gguf", "--gguf-type", mix, *OURS[method], *text]
        subprocess.run(command, check=True)
    (path,) = (folder / "model").glob("*.gguf")
    return path


def score(given: argparse.Namespace, reference: Path, files: list[Path], jobs: list[dict[str, Any]]) -> Any:
    """Has llama.cpp quantize and score."""
    job, result = given.work / "job.json", given.work / "result.json"
    windows = windows_of(given.model, given.text, given.windows)
    wanted = [str(reference), *map(str, files)]
    job.write_text(json.dumps({"quantize": jobs, "score": wanted, "windows": windows, "result": str(result)}))
    worker = ROOT / "benchmarks" / "peer_workers" / "llama_cpp_worker.py"
    subprocess.run([given.python, str(worker), str(job)], check=True, env={"PATH": "/usr/bin:/bin"})
    return json.loads(result.read_text())


def write_page(kept: dict[str, Any]) -> None:
    """The table between the marks."""
    methods = [*THEIRS, *OURS]
    plain = kept["float"]
    lines = [
        f"The float file has {plain['size_bytes'] / 1e6:.0f} MB and perplexity {plain['perplexity']:.2f}.",
        "",
        f"| KL (perplexity) | size MB | {' | '.join(methods)} |",
        f"|{'---|' * (len(methods) + 2)}",
    ]
    for mix, row in kept.items():
        if mix == "float":
            continue
        cells = []
        for method in methods:
            if (found := row.get(method)) is None:
                cells.append("")
                continue
            cells.append(f"{found['kl']:.4f} ± {found['kl_error']:.4f} ({found['perplexity']:.2f})")
        size = row.get("llama.cpp", next(iter(row.values())))["size_bytes"]
        lines.append(f"| {mix} | {size / 1e6:.0f} | {' | '.join(cells)} |")
    page = PAGE.read_text()
    first, last = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(page[:first] + "\n" + "\n".join(lines) + "\n" + page[last:])


if __name__ == "__main__":
    main()
