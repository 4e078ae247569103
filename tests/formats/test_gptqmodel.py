"""GPTQModel, the format's own reader, opens what we write and computes what we compute.

Runs where gptqmodel can be imported, or where QUANTCLI_GPTQMODEL_PYTHON names an interpreter that has it (as
`benchmarks/peers.py install gptqmodel` makes one). It reads in a process of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantcli.models.linear import PackedLinear
from quantcli.models.load import load
from quantcli.options import CalibrationOptions, Override, QuantizeOptions
from quantcli.pipelines import quantize

PYTHON = os.environ.get("QUANTCLI_GPTQMODEL_PYTHON") or (
    sys.executable if importlib.util.find_spec("gptqmodel") else None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="gptqmodel is not installed and QUANTCLI_GPTQMODEL_PYTHON is not set"),
]

# its torch kernel, which any processor runs; it computes in half precision, so it gets our weights in it
READER = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from gptqmodel import BACKEND, GPTQModel

ids = load_file(sys.argv[1])["ids"]
errors = {}
for folder in json.loads(sys.argv[2]):
    try:
        read = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
        weights = {}
        for name, module in read.model.named_modules():
            if hasattr(module, "dequantize_weight"):
                weights[name] = module.dequantize_weight().T.float().contiguous()
        with torch.inference_mode():
            logits = read.model(ids).logits.float()
        save_file(weights | {"logits": logits}, folder + "/read.safetensors")
    except Exception as error:
        errors[folder] = f"{type(error).__name__}: {error}"
with open(sys.argv[1] + ".errors", "w") as file:
    json.dump(errors, file)
"""

CASES = {
    **{
        f"rtn-{bits}-{'sym' if symmetric else 'asym'}": {"algorithm": "rtn", "bits": bits, "symmetric": symmetric}
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    },
    "rtn-per-channel": {"algorithm": "rtn", "group_size": -1},
    "rtn-short-last-group": {"algorithm": "rtn", "group_size": 64},
    "rtn-mixed": {
        "algorithm": "rtn",
        "overrides": (Override("down_proj", bits=8, group_size=16), Override("q_proj", symmetric=True)),
        "exclude": ("o_proj",),
    },
    "rtn-head": {"algorithm": "rtn", "quantize_lm_head": True},
    "kquant": {"algorithm": "kquant", "symmetric": True},
    "gptq-static": {"algorithm": "gptq", "symmetric": True},
    "gptq-desc-act": {"algorithm": "gptq", "settings": {"order": "desc_act"}},
}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Every case quantized by us, and the same folder as GPTQModel reads it."""
    root = tmp_path_factory.mktemp("gptqmodel")
    config = LlamaConfig(
        vocab_size=224,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "float")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(223)} | {"<unk>": 223}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="w0").save_pretrained(root / "float")
    drawn = torch.randint(1, 223, (2000,)).tolist()
    (root / "text.txt").write_text(" ".join(f"w{i}" for i in drawn))
    calibration = CalibrationOptions(str(root / "text.txt"), num_samples=16, seq_len=32)
    for name, values in CASES.items():
        more = {"calibration": calibration} if values["algorithm"] == "gptq" else {}
        options = {"group_size": 32, "device": "cpu"} | values | more
        quantize.run(QuantizeOptions(str(root / "float"), root / name, **options))
    ids = torch.randint(1, 223, (2, 24))
    save_file({"ids": ids}, root / "ids.safetensors")
    folders = [str(root / name / "model") for name in CASES]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    for variable in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONWARNINGS"):
        environment.pop(variable, None)
    done = subprocess.run(
        [str(PYTHON), "-c", READER, str(root / "ids.safetensors"), json.dumps(folders)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    errors = json.loads((root / "ids.safetensors.errors").read_text())
    return root, ids, {name: errors.get(str(root / name / "model")) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits(read, case):
    root, ids, errors = read
    assert errors[case] is None
    folder = root / case / "model"
    theirs = load_file(folder / "read.safetensors")
    model = load(folder, device="cpu")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert set(packed) == theirs.keys() - {"logits"}
    for name, module in packed.items():
        ours = module.dequantize()
        # the same codes and scales, the product rounded to half precision
        torch.testing.assert_close(theirs[name], ours, rtol=2**-10, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    with torch.inference_mode():
        logits = model(ids).logits
    error = float((theirs["logits"] - logits).norm() / logits.norm())
    assert error < 0.02, f"relative error of the logits {error:.4f}"


def test_the_cases_hold_what_is_hard_to_read(read):
    root, _, _ = read

    def parts(case: str, part: str) -> list[torch.Tensor]:
        files = (root / case / "model").glob("model*.safetensors")
        return [t for file in files for n, t in load_file(file).items() if n.endswith("." + part)]

    assert any(bool((t < 0).any()) for t in parts("rtn-4-sym", "scales")), "no negative scale"
    assert any(bool((t[1:] < t[:-1]).any()) for t in parts("gptq-desc-act", "g_idx")), "no group out of order"
    assert len({int(t) for part in parts("rtn-8-asym", "qzeros") for t in part.flatten()}) > 2, "one zero for all"
