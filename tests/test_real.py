"""The chain on the demo model, command by command, as `make demo` and a person run it; on less text, to be quick."""

import json
import subprocess
import sys

import pytest

PROMPT = "The capital of France is"

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def model():
    import fetch_demo_model

    return fetch_demo_model.main()


@pytest.fixture(scope="module")
def text():
    import fetch_demo_text

    return fetch_demo_text.main()


def quantcli(*words, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "quantcli", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done


def test_quantize_capture_generate_evaluate(model, text, tmp_path):
    calibration, evaluation = text / "calibration.jsonl", text / "evaluation.jsonl"
    quantized, captured = tmp_path / "quantized", tmp_path / "captured"
    few = ("--num-samples", 8, "--seq-len", 256)
    made = quantcli("quantize", "-m", model, "-a", "gptq", "--data", calibration, *few, "-o", quantized, "--json")
    result = json.loads(made.stdout)
    assert len(result["layers"]) == 210
    assert result["size_bytes"] < 0.33 * result["parent_size_bytes"]
    assert all(layer["relative_error"] < layer["rtn_relative_error"] for layer in result["layers"])

    quantcli("capture-onnx-graph", "--model_name_or_path", quantized / "model", "--output_path", captured,
             "--use_ort_genai", "True", "--log_level", 1, "--accuracy-level", 0)  # fmt: skip
    assert " Paris" in sentence(captured / "model")

    judged = ("--reference", model, "--data", evaluation, "--num-samples", 3, "--seq-len", 256, "--json")
    packed = json.loads(quantcli("evaluate", "-m", quantized, *judged, "--max-kl", 0.5).stdout)
    graph = json.loads(quantcli("evaluate", "-m", captured, *judged).stdout)
    assert packed["kl_mean"] < 0.35 and packed["top1_agreement"] > 0.7
    assert graph["perplexity"] == pytest.approx(packed["perplexity"], rel=0.005)
    refused = quantcli("evaluate", "-m", quantized, *judged, "--max-kl", 0.001, code=5)
    assert "kl" in refused.stderr.lower()
    histogram = quantcli("inspect", quantized).stdout
    assert "210" in histogram


def sentence(folder):
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=16, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode(PROMPT))
    while not generator.is_done():
        generator.generate_next_token()
    return str(tokenizer.decode(generator.get_sequence(0)))
