"""Shell blocks that users bring along, run by bash as they are written, on a tiny model.

`shell_blocks.md` has them. Only the name of the program, the model and the data are others.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from quantcli.evaluate.genai_model import GenaiModel
from quantcli.evaluate.text import open_tokenizer
from quantcli.finetune.lora import open_lora
from quantcli.folder import read_manifest
from quantcli.models.load import load
from quantcli.options import GenerateOptions
from quantcli.pipelines import generate

BLOCKS = re.findall(
    r"^```bash\n(.*?)^```$", Path(__file__).with_name("shell_blocks.md").read_text(), re.DOTALL | re.MULTILINE
)
"""Quantize; quantize and capture; quantize, finetune and generate adapters."""

# peft asks transformers for a name that it is about to give up
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model folder, a file of phrases with their tone, and a phrase."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.checkpoint(folder / "model", max_position_embeddings=64)
    tiny.edit_weights(folder / "model", lambda tensors: [t.mul_(6) for t in tensors.values() if t.ndim == 2])
    rows = [{"phrase": f"{tiny.words(4, 9 * i)} w{20 + i % 2}", "tone": ("w50", "w60")[i % 2]} for i in range(40)]
    (folder / "tones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model", folder / "tones.jsonl", rows[0]["phrase"]


def run(block, folder, model, data):
    program = f"{shlex.quote(sys.executable)} -m quantcli"
    script = re.sub(r"^olive(?= )", lambda _: program, block, flags=re.MULTILINE)
    script = script.replace("meta-llama/Llama-3.2-1B-Instruct", shlex.quote(str(model)))
    script = script.replace("--data_name xxyyzzz/phrase_classification", f"--data_files {shlex.quote(str(data))}")
    assert "meta-llama" not in script and "xxyyzzz" not in script
    done = subprocess.run(["bash", "-e", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_quantize_and_capture(inputs, tmp_path):
    model, data, phrase = inputs
    assert BLOCKS[0] in BLOCKS[1]  # the first block needs no run of its own
    run(BLOCKS[1], tmp_path, model, data)
    layers = json.loads((tmp_path / "quantized-model" / "report.json").read_text())["layers"]
    assert {layer["bits"] for layer in layers} == {4}
    assert read_manifest(tmp_path / "onnx-model").command == "capture-onnx-graph"
    assert generate.run(GenerateOptions(str(tmp_path / "onnx-model"), phrase, max_new_tokens=8)).tokens


def test_quantize_finetune_and_generate_adapters(inputs, tmp_path):
    model, data, phrase = inputs
    assert BLOCKS[0] in BLOCKS[2]
    run(BLOCKS[2], tmp_path, model, data)
    finetuned, onnx = tmp_path / "finetuned-model", tmp_path / "adapter-onnx"
    metrics = read_manifest(finetuned).metrics
    assert metrics["steps"] == 30
    assert metrics["eval_loss"] < metrics["base_loss"]

    prompt = torch.tensor(open_tokenizer(finetuned / "model", False)(phrase)["input_ids"])
    checkpoint = load(finetuned, device="cpu")
    for adapter in (None, "adapter"):
        made = generate.run(GenerateOptions(str(onnx), phrase, adapter=adapter, max_new_tokens=8))
        assert 0 < len(made.tokens) <= 8
        adapted = open_lora(checkpoint, finetuned / "adapter") if adapter else checkpoint
        with torch.inference_mode():
            wanted = adapted(input_ids=prompt[None]).logits[0]
        found = logits(onnx / "model", adapter, prompt)
        other = logits(onnx / "model", "adapter" if adapter is None else None, prompt)
        assert (found - wanted).norm() < 1e-3 * wanted.norm()
        assert (found - wanted).norm() < 0.1 * (other - wanted).norm()


def logits(folder, adapter, tokens):
    model = GenaiModel(folder, adapter)
    try:
        return model.logits(tokens)
    finally:
        model.close()
