"""llama.cpp through llama-cpp-python: `llama_cpp_worker.py JOB.json`, run by the interpreter that has it.

The job names files to quantize by `llama_model_quantize`, then files to score: each sees the same tokens, and its
distributions are compared with those of the first.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np


def quantize(source: str, target: str, mix: str, importance: str | None) -> None:
    """llama.cpp's own quantization, with an importance matrix where one is given."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{_constant(mix)}")
    parameters.nthread = 1
    if importance is not None:
        found = np.load(importance)
        kept = {name: np.ascontiguousarray(found[name], dtype=np.float32) for name in found.files}
        kind = parameters.imatrix._type_
        entries = (kind * (len(kept) + 1))()
        for entry, (name, values) in zip(entries, kept.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        parameters.imatrix = entries
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama_model_quantize failed on {target}")


def score(files: list[str], windows: list[list[int]]) -> dict[str, dict[str, float]]:
    """Mean divergence from the first file in nats per token, its standard error, and perplexity, by file."""
    from llama_cpp import Llama

    reference: list[np.ndarray] = []
    found = {}
    for path in files:
        model = Llama(path, n_ctx=len(windows[0]), n_batch=512, logits_all=True, verbose=False, n_threads=1)
        divergence, loss = [], []
        for number, tokens in enumerate(windows):
            model.reset()
            model.eval(tokens)
            logits = np.asarray(model.scores[: len(tokens)], dtype=np.float32)
            logits = logits - logits.max(1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(1, keepdims=True))
            loss.append(-logits[np.arange(len(tokens) - 1), tokens[1:]].mean())
            if path == files[0]:
                reference.append(logits.astype(np.float16))
            expected = reference[number].astype(np.float32)
            divergence.append(float((np.exp(expected) * (expected - logits)).sum(1).mean()))
        model.close()
        found[path] = {
            "kl": float(np.mean(divergence)),
            "kl_error": float(np.std(divergence, ddof=1) / len(divergence) ** 0.5),
            "perplexity": float(np.exp(np.mean(loss))),
        }
    return found


def _constant(mix: str) -> str:
    """q4_k_m as the constants have it: Q4_K_M; legacy types and pure ones as they are."""
    return mix.upper()


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    for each in job.get("quantize", []):
        if not Path(each["target"]).is_file():
            quantize(**each)
    if job.get("score"):
        Path(job["result"]).write_text(json.dumps(score(job["score"], job["windows"])))
