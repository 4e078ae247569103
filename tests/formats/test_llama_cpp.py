"""llama.cpp opens what we write: its logits, tokens, template and mixes of types beside ours.

Runs where QUANTCLI_LLAMA_CPP_PYTHON names an interpreter that has llama-cpp-python. It reads in a process of its own.
Files of floats show that names, numbers and order of rows are right: what differs is the cache, float16 there. In
quantized files llama.cpp rounds activations to 8 bits as well, which moves the logits of these random models by 2 to 5
per cent, and where experts are chosen, more.
"""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from gguf_models import FAMILIES, TEMPLATE, TOKENIZERS, VOCABULARY, save, text
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.conversion import as_in_model
from quantcli.models.gguf.families import family_of
from quantcli.models.gguf.names import tensors_of
from quantcli.models.gguf.vocabulary import read_vocabulary
from quantcli.models.gguf.writer import GgufContent, write_gguf
from quantcli.models.load import load
from quantcli.models.skeleton import build_skeleton
from quantcli.options import GGUF_TYPES, CalibrationOptions, QuantizeOptions
from quantcli.pipelines import quantize

PYTHON = os.environ.get("QUANTCLI_LLAMA_CPP_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="QUANTCLI_LLAMA_CPP_PYTHON is not set"),
]

READER = """
import ctypes, json, sys
import numpy as np
import llama_cpp

job = json.load(open(sys.argv[1]))
found = {}
for source, target, mix in job["quantize"]:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + mix), 1
    assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)) == 0
for path in job["files"]:
    try:
        model = llama_cpp.Llama(path, n_ctx=256, n_batch=256, logits_all=True, verbose=False, n_threads=1)
    except ValueError as error:
        found[path] = {"error": str(error)}
        continue
    model.eval(job["ids"])
    np.save(path + ".npy", np.array(model.scores[: len(job["ids"])]))
    tokens = [model.tokenize(t.encode(), add_bos=True, special=True) for t in job["texts"]]
    found[path] = {"tokens": tokens, "template": model.metadata.get("tokenizer.chat_template")}
    model.close()
json.dump(found, open(sys.argv[1] + ".found", "w"))
"""
TEXTS = [
    "hello world", " two  spaces\n\nand\ttabs ", "123456 7,8.90", "don't I'LL we've", "日本語 and 🙂👍🏽", "naïve été",
    "<s> inside </s> text", "x" * 70, "   lead", "trail   ", "a\r\nb\n", "", "the cat sat on the mat",
]  # fmt: skip
QUANTIZED = {  # family, mix, algorithm
    **{f"{family} q4_k_m": (family, "q4_k_m", {"algorithm": "rtn"}) for family in FAMILIES},
    **{f"llama {mix}": ("llama", mix, {"algorithm": "rtn"}) for mix in GGUF_TYPES},
    "llama gptq": ("llama", "q4_k_m", {"algorithm": "gptq"}),
    "llama best": ("llama", "q3_k_m", {"preset": "best"}),
    "llama head": ("llama-tied", "q4_k_m", {"algorithm": "rtn", "quantize_lm_head": True}),
    "llama float head": ("llama", "q4_k_m", {"algorithm": "rtn", "exclude": ("lm_head", "embed_tokens", "k_proj")}),
}


def write_float(source, target):
    """The model as a file of floats."""
    skeleton = build_skeleton(source)
    tensors = as_in_model(Checkpoint.open(source), skeleton)
    config = skeleton.config.get_text_config()
    parts = tensors_of(skeleton, family_of(config), head=None if config.tie_word_embeddings else "lm_head")
    content = GgufContent(
        config, family_of(config), parts, read_vocabulary(source, config.vocab_size), "tiny", None, "quantcli"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(target, tensors, tensors.names, {}, content)
    return target


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama-cpp")
    sources = {family: save(family, root / "sources" / family) for family in FAMILIES}
    sources |= {f"cut {name}": save("llama", root / "sources" / f"cut-{name}", name) for name in TOKENIZERS}
    files = {name: write_float(source, root / "float" / f"{name}.gguf") for name, source in sources.items()}
    calibration = CalibrationOptions(str(text(root)), num_samples=4, seq_len=64)
    for name, (family, mix, values) in QUANTIZED.items():
        more = {} if values.get("algorithm") == "rtn" else {"calibration": calibration}
        output = root / name.replace(" ", "-")
        quantize.run(QuantizeOptions(str(sources[family]), output, gguf_type=mix, device="cpu", **values, **more))
        (files[name],) = (output / "model").glob("*.gguf")
    made = {mix: root / f"theirs-{mix}.gguf" for mix in GGUF_TYPES}
    generator = np.random.default_rng(0)
    job = {
        "files": [str(path) for path in files.values()],
        "quantize": [(str(files["llama"]), str(path), mix.upper()) for mix, path in made.items()],
        "ids": [int(i) for i in generator.integers(3, 250, 40)],
        "texts": TEXTS,
    }
    (root / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [str(PYTHON), "-c", READER, str(root / "job.json")],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads((root / "job.json.found").read_text())
    return sources, files, {name: found[str(path)] for name, path in files.items()}, job["ids"], made


def logits_of(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


def divergence(expected, found):
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_floats_is_the_model(read, family):
    sources, files, found, ids, _ = read
    assert "error" not in found[family]
    expected = logits_of(load(sources[family], device="cpu"), ids)
    theirs = torch.from_numpy(np.load(f"{files[family]}.npy")).float()
    assert float((theirs - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_logits(read, case):
    _, files, found, ids, _ = read
    assert "error" not in found[case]
    expected = logits_of(load(files[case], device="cpu"), ids)
    theirs = torch.from_numpy(np.load(f"{files[case]}.npy")).float()
    assert divergence(expected, theirs) < (2e-2 if "mixtral" in case or "moe" in case else 1.5e-3)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens(read, name):
    sources, _, found, _, _ = read
    tokenizer = AutoTokenizer.from_pretrained(sources[f"cut {name}"])
    for given, theirs in zip(TEXTS, found[f"cut {name}"]["tokens"], strict=True):
        assert theirs == tokenizer(given).input_ids, given
    assert found[f"cut {name}"]["template"] == TEMPLATE


@pytest.mark.parametrize("mix", GGUF_TYPES)
def test_mixes_are_llama_quantize_s(read, mix):
    import gguf

    _, files, _, _, made = read
    ours, theirs = (
        {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        for path in (files[f"llama {mix}"], made[mix])
    )
    assert ours == theirs
    assert VOCABULARY % 128 == 0  # the types' own blocks, not those that take their place
