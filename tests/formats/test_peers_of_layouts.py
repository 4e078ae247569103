"""compressed-tensors opens W8A8, FP8, NVFP4 and MXFP4 folders of ours, and we open those of llm-compressor, exactly.

The first runs where compressed_tensors can be imported, or where QUANTCLI_COMPRESSED_TENSORS_PYTHON names an
interpreter that has it and transformers; the second the same with llmcompressor and QUANTCLI_LLMCOMPRESSOR_PYTHON. Both
compute in float32, activations rounded as each layout says, so that logits are to be equal bit for bit.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import tiny
from quantcli.models.load import load
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines import quantize

pytestmark = pytest.mark.slow
IDS = torch.arange(3, 40)[None]


def interpreter(package, variable):
    return os.environ.get(variable) or (sys.executable if importlib.util.find_spec(package) else None)


READER = interpreter("compressed_tensors", "QUANTCLI_COMPRESSED_TENSORS_PYTHON")
WRITER = interpreter("llmcompressor", "QUANTCLI_LLMCOMPRESSOR_PYTHON")

READ = """
import functools, json, sys, warnings
warnings.filterwarnings("ignore")
import torch
import compressed_tensors.compressors.nvfp4.base as fp4
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

# FP4 weights come out in bfloat16 whatever the model runs in
fp4.unpack_fp4_from_uint8 = functools.partial(fp4.unpack_fp4_from_uint8, dtype=torch.float32)

def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits.contiguous()
"""
OPEN = (
    READ
    + """
for folder in json.loads(sys.argv[1]):
    save_file({"logits": logits(folder)}, folder + "/read.safetensors")
"""
)
WRITE = (
    READ
    + """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

tokens = torch.randint(3, 60, (8, 64), generator=torch.Generator().manual_seed(0))
data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
for scheme in json.loads(sys.argv[1]):
    folder, name = sys.argv[3] + "/" + scheme, scheme.removesuffix("-cache")
    extra = {"kv_cache_scheme": cache} if name != scheme else {}
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
    recipe = QuantizationModifier(targets="Linear", scheme=name, ignore=["lm_head"], **extra)
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=64, num_calibration_samples=8)
    model.save_pretrained(folder, save_compressed=True)
    save_file({"logits": logits(folder)}, folder + "/theirs.st")
"""
)

OURS = {
    "int8": {"format": "int-quantized"},
    "int8-static": {"format": "int-quantized", "activations": "static"},
    "fp8": {"format": "float-quantized"},
    "fp8-static": {"format": "float-quantized", "activations": "static"},
    "fp8-blocks": {"format": "float-quantized", "group_size": 128},
    "fp8-cache": {"format": "float-quantized", "kv_cache": "fp8"},
    "int4-cache": {"format": "compressed-tensors", "kv_cache": "fp8"},
    "nvfp4": {"format": "nvfp4-pack-quantized", "quantize_lm_head": True, "exclude": ("o_proj",)},
    "nvfp4-a16": {"format": "nvfp4-pack-quantized", "activations": "float"},
    "mxfp4": {"format": "mxfp4-pack-quantized"},
    "mxfp4-a16": {"format": "mxfp4-pack-quantized", "activations": "float"},
}
THEIRS = (
    "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "W4A8", "W8A8-cache",
)  # fmt: skip


def run(python, script, *words):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-c", script, *words], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def logits(folder):
    with torch.no_grad():
        return load(folder, device="cpu")(IDS).logits


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("layouts") / "float", hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def opened(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("ours")
    text = CalibrationOptions(data="builtin", num_samples=4, seq_len=64)
    for name, options in OURS.items():
        quantize.run(
            QuantizeOptions(str(source), root / name, algorithm="gptq", calibration=text, device="cpu", **options)
        )
    run(READER, OPEN, json.dumps([str(root / name / "model") for name in OURS]))
    return root


@pytest.mark.skipif(READER is None, reason="compressed_tensors is not there, nor QUANTCLI_COMPRESSED_TENSORS_PYTHON")
@pytest.mark.parametrize("name", OURS)
def test_compressed_tensors_computes_what_we_compute(opened, name):
    theirs = load_file(opened / name / "model" / "read.safetensors")["logits"]
    (opened / name / "model" / "read.safetensors").unlink()  # or it would be a shard
    assert torch.equal(logits(opened / name), theirs)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("theirs")
    run(WRITER, WRITE, json.dumps(THEIRS), str(source), str(root))
    return root


@pytest.mark.skipif(WRITER is None, reason="llmcompressor is not there, nor QUANTCLI_LLMCOMPRESSOR_PYTHON")
@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_what_llm_compressor_wrote(written, name):
    assert torch.equal(logits(written / name), load_file(written / name / "theirs.st")["logits"])
