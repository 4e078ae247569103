"""Olive's own checkpoints: tensors packed by a literal writer, and Olive itself where it is installed.

The last test runs where QUANTCLI_OLIVE_PYTHON names an interpreter that has olive-ai (0.13.0), as
`benchmarks/peers.py install olive` makes one.
"""

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

import tiny
from quantcli.errors import InputError
from quantcli.formats import olive
from quantcli.models.linear import PackedEmbedding, PackedLinear
from quantcli.models.load import load
from quantcli.scheme import Scheme

PYTHON = os.environ.get("QUANTCLI_OLIVE_PYTHON")


def literal_bytes(values: list[list[int]], bits: int) -> torch.Tensor:
    """Rows of codes to rows of bytes, the first code in the low bits."""
    per = 8 // bits
    rows = []
    for row in values:
        filled = row + [0] * (-len(row) % per)
        rows.append([sum(filled[i + j] << (bits * j) for j in range(per)) for i in range(0, len(filled), per)])
    return torch.tensor(rows, dtype=torch.uint8)


def test_golden_bytes():
    tensors = {
        "qweight": torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2], dtype=torch.uint8),
        "scales": torch.tensor([[0.5, 2.0]]),
        "qzeros": torch.tensor([[0x81]], dtype=torch.uint8),
    }
    q = olive.unpack(tensors, Scheme(4, 16))
    assert q.codes.tolist() == [[*range(16), *range(16)]]
    assert q.zero.tolist() == [[1, 8]]
    assert q.dequantize()[0, [0, 15, 16, 31]].tolist() == [-0.5, 7.0, -16.0, 14.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_random_tensors(bits, group_size, symmetric):
    scheme = Scheme(bits, group_size, symmetric)
    rows, columns, groups = 7, 48, scheme.group_count(48)
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=g)
    zeros = torch.randint(0, scheme.levels, (rows, groups), generator=g)
    tensors = {"qweight": literal_bytes(codes.tolist(), bits), "scales": torch.randn(rows, groups, generator=g)}
    if symmetric:
        zeros = torch.full_like(zeros, scheme.middle)
    else:
        tensors["qzeros"] = literal_bytes(zeros.tolist(), bits)
    q = olive.unpack(tensors, scheme)
    per = columns // groups
    expected = (codes - zeros.repeat_interleave(per, 1)) * tensors["scales"].repeat_interleave(per, 1)
    assert torch.equal(q.dequantize(), expected)
    for name, part in tensors.items():
        for broken in (None, part[:, :-1], part[:-1], part[0], part.to(torch.int16)):
            parts = {n: t for n, t in tensors.items() if n != name} | ({} if broken is None else {name: broken})
            try:
                read = olive.unpack(parts, scheme)
            except InputError:
                continue
            assert read.shape[1] < columns, f"{name} {broken}"  # fewer inputs, which no model expects


def test_schemes():
    config = {"bits": 4, "group_size": 32, "symmetric": True, "overrides": {"a.b": {"bits": 8, "symmetric": False}}}
    assert olive.scheme_of(config, "a.b") == Scheme(8, 32)
    assert olive.scheme_of(config, "a.c") == Scheme(4, 32, symmetric=True)
    assert olive.scheme_of(config | {"overrides": None}, "a.b") == Scheme(4, 32, symmetric=True)
    with pytest.raises(InputError, match="3 bits"):
        olive.scheme_of(config | {"bits": 3}, "a.c")
    zeros = {"qweight": torch.zeros(2, 8, dtype=torch.uint8), "scales": torch.ones(2, 1)}
    with pytest.raises(InputError, match="says symmetric"):
        olive.unpack(zeros | {"qzeros": torch.zeros(2, 1, dtype=torch.uint8)}, Scheme(4, 16, True))


def test_a_quantized_embedding_that_the_head_shares(tmp_path):
    """As Olive writes it: the model's config says untied, its quantization_config says tied."""
    folder = tiny.checkpoint(tmp_path / "f", "qwen2", tie_word_embeddings=True)
    float_model = load(folder, device="cpu")
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (tiny.VOCABULARY, 64), generator=g)
    scales = 0.001 * (1 + torch.rand(tiny.VOCABULARY, 1, generator=g))

    def pack(tensors):
        del tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.qweight"] = codes.to(torch.uint8)
        tensors["model.embed_tokens.scales"] = scales

    tiny.edit_weights(folder, pack)
    config = {"quant_method": "olive", "bits": 8, "group_size": -1, "symmetric": True, "overrides": None}
    config |= {"embeds": True, "lm_head": True, "tie_word_embeddings": True}
    tiny.edit_json(folder / "config.json", quantization_config=config, tie_word_embeddings=False)
    model = load(folder, device="cpu")
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert model.get_output_embeddings() is model.get_input_embeddings().packed
    float_model.get_input_embeddings().weight.data = (codes - 128) * scales
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, float_model(ids).logits, rtol=1e-4, atol=1e-5)


MAKER = """
import json, sys
import torch
from olive.hardware import DEFAULT_CPU_ACCELERATOR
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.rtn import Rtn
from safetensors.torch import save_file

for source, out, settings in json.loads(sys.argv[1]):
    rtn = create_pass_from_dict(Rtn, settings, disable_search=True, accelerator_spec=DEFAULT_CPU_ACCELERATOR)
    model = rtn.run(HfModelHandler(model_path=source), out).load_model()
    weights = {
        n + ".weight": m.unpack_and_dequantize(m.qweight, m.scales, m.qzeros).float().clone()
        for n, m in model.named_modules() if hasattr(m, "unpack_and_dequantize")
    }
    with torch.no_grad():
        logits = model(torch.arange(3, 30)[None]).logits
    save_file(weights | {"logits": logits.contiguous()}, out + ".safetensors")
"""

CASES = {
    "4 bits": ("llama", {"bits": 4, "group_size": 16}),
    "an override": ("llama", {"bits": 4, "group_size": 32, "overrides": {"model.layers.0.mlp.down_proj": {"bits": 8}}}),
    "2 bits with the head": ("llama", {"bits": 2, "group_size": 16, "lm_head": True}),
    "symmetric per channel": ("llama", {"bits": 8, "group_size": -1, "sym": True}),
    "embedding and head tied": ("qwen2", {"bits": 4, "group_size": 32, "sym": True, "lm_head": True, "embeds": True}),
}


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="QUANTCLI_OLIVE_PYTHON is not set")
def test_we_open_what_olive_writes(tmp_path):
    folders = {
        kind: tiny.checkpoint(tmp_path / kind, kind, tie_word_embeddings=kind == "qwen2") for kind in ("llama", "qwen2")
    }
    jobs = [[str(folders[kind]), str(tmp_path / name), settings] for name, (kind, settings) in CASES.items()]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(PYTHON), "-c", MAKER, json.dumps(jobs)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for name in CASES:
        expected = load_file(tmp_path / f"{name}.safetensors")
        model = load(tmp_path / name, device="cpu")
        packed = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
        assert len(packed) >= 14, name
        for weight, module in packed.items():
            of = weight.replace(".packed", "")
            torch.testing.assert_close(module.dequantize(), expected[of], rtol=1e-6, atol=0, msg=f"{name}: {of}")
        with torch.no_grad():
            logits = model(torch.arange(3, 30)[None]).logits
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4, msg=name)
