"""AutoAWQ and GPTQModel open our awq folders and compute what we compute.

Each runs where it can be imported, or where QUANTCLI_AUTOAWQ_PYTHON and QUANTCLI_GPTQMODEL_PYTHON name interpreters
that have autoawq (0.2.9, `--no-deps`) and gptqmodel (7.6.0). They read in a process of their own.
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
from quantcli.models.linear import PackedLinear
from quantcli.models.load import load
from quantcli.options import QuantizeOptions
from quantcli.pipelines import quantize

pytestmark = pytest.mark.slow

# AutoAWQ asks for intel_extension_for_pytorch on a CPU, to repack for its kernel; its own layers run without
AUTOAWQ = """
import json, sys
from pathlib import Path
import torch
from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
from awq.models._config import AwqConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

for folder in json.loads(sys.argv[1]):
    config, scheme = AutoConfig.from_pretrained(folder), AwqConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    family = AWQ_CAUSAL_LM_MODEL_MAP[config.model_type]
    family._load_quantized_modules(family, model, scheme, scheme.version, False, False, False)
    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= load_file(file)
    model.load_state_dict(tensors, strict=True)
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            with torch.no_grad():
                found = module(torch.eye(module.in_features, dtype=torch.float16)[None])[0]
                weights[name] = (found - module.bias if module.bias is not None else found).T.float().contiguous()
    with torch.no_grad():
        logits = model(torch.arange(3, 30)[None]).logits.float()
    save_file(weights | {"logits": logits}, folder + "/read.st")
"""

GPTQMODEL = """
import json, sys
import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file

for folder in json.loads(sys.argv[1]):
    read = GPTQModel.load(folder, device="cpu", backend=BACKEND.AWQ_TORCH, dtype=torch.float16)
    weights = {}
    for name, module in read.model.named_modules():
        if hasattr(module, "qweight"):
            with torch.no_grad():
                found = module(torch.eye(module.in_features, dtype=torch.float16))
                weights[name] = (found - module.bias if module.bias is not None else found).T.float().contiguous()
    with torch.no_grad():
        logits = read.model(torch.arange(3, 30)[None]).logits.float()
    save_file(weights | {"logits": logits}, folder + "/read.st")
"""

READERS = {"awq": ("QUANTCLI_AUTOAWQ_PYTHON", AUTOAWQ), "gptqmodel": ("QUANTCLI_GPTQMODEL_PYTHON", GPTQMODEL)}
CASES = {
    "asym": {"group_size": 32},
    "sym": {"group_size": 32, "symmetric": True},
    "per channel": {"group_size": -1},
    "some float": {"group_size": 32, "exclude": ("o_proj",)},
}


@pytest.mark.parametrize("package", READERS)
def test_weights_and_logits(tmp_path, package):
    variable, reader = READERS[package]
    python = os.environ.get(variable) or (sys.executable if importlib.util.find_spec(package) else None)
    if python is None:
        pytest.skip(f"{package} is not installed and {variable} is not set")
    source = tiny.checkpoint(tmp_path / "float")
    for case, values in CASES.items():
        options = {"algorithm": "rtn", "format": "awq", "device": "cpu"} | values
        quantize.run(QuantizeOptions(str(source), tmp_path / case, **options))
    folders = [str(tmp_path / case / "model") for case in CASES]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment |= {"PYTHONPATH": os.environ.get(f"{variable}PATH", ""), "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(
        [python, "-c", reader, json.dumps(folders)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for case in CASES:
        folder = tmp_path / case / "model"
        theirs = load_file(folder / "read.st")
        model = load(folder, device="cpu")
        packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
        assert set(packed) == theirs.keys() - {"logits"}, case
        for name, module in packed.items():  # the same codes and scales, the product rounded to half precision
            torch.testing.assert_close(theirs[name], module.dequantize(), rtol=2**-10, atol=0, msg=f"{case}: {name}")
        with torch.no_grad():
            logits = model(torch.arange(3, 30)[None]).logits
        assert float((theirs["logits"] - logits).norm() / logits.norm()) < 0.02, case
    stored = [load_file(file) for file in (tmp_path / "sym" / "model").glob("*.safetensors")]
    scales = [t for tensors in stored for n, t in tensors.items() if n.endswith(".scales")]
    assert any(bool((t < 0).any()) for t in scales), "no negative scale"
