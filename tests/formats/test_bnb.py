"""The bnb format: round trips, golden bytes, damage, and layers that run from it; no bitsandbytes needed."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.errors import InputError
from quantcli.formats import bnb
from quantcli.formats.codec import Described, Held
from quantcli.models.codebook_linear import CodebookLinear
from quantcli.scheme import Scheme
from quantcli.tensors.codebook import VALUES, codebook, round_to_codebook

STATE = "weight.quant_state.bitsandbytes__nf4"


def tensor(rows=6, columns=96, size=32, name="nf4", double_quant=False, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return round_to_codebook(weight, Scheme(4, size, codebook=name, double_quant=double_quant))


@given(
    rows=st.integers(1, 40), blocks=st.integers(1, 4), size=st.sampled_from([32, 64, 128, -1]),
    name=st.sampled_from(tuple(VALUES)), double_quant=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_round_trip(rows, blocks, size, name, double_quant, seed):
    columns = 32 if size == -1 else blocks * size
    made = tensor(rows, columns, size, name, double_quant, seed)
    assert bnb.CODEC.refuse(Held(rows, columns, made.scheme, True, True)) is None
    stored = bnb.pack(made)
    assert set(stored) <= set(bnb.PARTS)
    size_bytes = sum(t.numel() * t.element_size() for t in stored.values())
    assert abs(size_bytes - bnb.CODEC.packed_bytes(rows, columns, made.scheme)) <= (16 if double_quant else 0)
    read = bnb.unpack(stored, made.scheme)
    for part in ("codes", "scale", "zero", "group", "codebook"):
        assert torch.equal(getattr(read, part), getattr(made, part))
    assert (read.nested is None) == (made.nested is None)
    if read.nested is not None:
        for part in ("codes", "absmax", "code_map"):
            assert torch.equal(getattr(read.nested, part), getattr(made.nested, part))
        assert (read.nested.offset, read.nested.size) == (made.nested.offset, made.nested.size)


def test_golden_bytes():
    weight = torch.cat([codebook("nf4"), codebook("nf4").flip(0)])[None] * 2
    stored = bnb.pack(round_to_codebook(weight, Scheme(4, 32, codebook="nf4")), torch.bfloat16)
    assert bytes(stored["weight"][:, 0].tolist()).hex() == "0123456789abcdeffedcba9876543210"
    assert stored["weight"].shape == (16, 1)
    assert stored["weight.absmax"].tolist() == [2.0]
    assert torch.equal(stored["weight.quant_map"], codebook("nf4"))
    said = '{"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [1, 32]}'
    assert bytes(stored[STATE].tolist()).decode() == said


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (Held(8, 64, Scheme(4, 32), True, True), "nothing else"),
        (Held(8, 96, Scheme(4, 64, codebook="nf4"), True, True), "--group-size 32 does"),
        (Held(8, 72, Scheme(4, 64, codebook="nf4"), True, True), "none does, leave it float"),
        (Held(8, 96, Scheme(4, 48, codebook="nf4"), True, True), "blocks of 48 are not a power of two from 32"),
        (Held(8, 96, Scheme(4, -1, codebook="nf4"), True, True), "blocks of 96"),
        (Held(8, 64, Scheme(4, 64, codebook="nf4"), True, False), "neighbouring"),
        (Held(8, 64, Scheme(4, 64, codebook="nf4"), True, True, expert=True), "experts"),
        (Held(8, 64, Scheme(4, 64, codebook="nf4"), True, True), None),
        (Held(7, 33 * 64, Scheme(4, 64, codebook="fp4"), False, True), None),
    ],
)
def test_what_it_cannot_hold(held, why):
    said = bnb.CODEC.refuse(held)
    assert (said is None) if why is None else why in said


def test_config():
    scheme = Scheme(4, 64, codebook="fp4", double_quant=True)
    described = Described(
        scheme, {}, [], desc_act=False, head=None, producer="p", float_linears=["lm_head"], dtype=torch.float16
    )
    config = bnb.CODEC.config(described)
    assert config["quant_method"] == "bitsandbytes" and config["load_in_4bit"]
    assert config["bnb_4bit_quant_type"] == "fp4" and config["bnb_4bit_use_double_quant"]
    assert config["bnb_4bit_compute_dtype"] == "float16" and config["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_writers_dtypes(name, double_quant, dtype):
    """absmax and codes may come in other dtypes; bytes are bytes."""
    made = tensor(4, 64, 32, name, double_quant)
    stored = bnb.pack(made)
    stored["weight"] = stored["weight"].reshape(-1).view(dtype)[:, None]
    part = "weight.nested_absmax" if double_quant else "weight.absmax"
    stored[part] = stored[part].to(dtype)
    read = bnb.read_state(stored)
    tolerance = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(read.absmax, made.scale.reshape(-1), rtol=tolerance, atol=tolerance)
    assert torch.equal(CodebookLinear(stored).quantized().codes, made.codes)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_the_layer_is_the_dequantized_matrix_and_so_are_its_gradients(double_quant, cache):
    made = tensor(300, 96, 32, "nf4", double_quant)
    bias = torch.randn(300, generator=torch.Generator().manual_seed(1))
    layer = CodebookLinear(bnb.pack(made), bias=bias, cache=cache)
    weight = made.dequantize()
    assert torch.equal(layer.dequantize(), weight)
    assert torch.equal(layer.quantized().dequantize(), weight)
    for rows in (1, 5, 40):
        x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(2), requires_grad=True)
        other = x.detach().clone().requires_grad_()
        ours, expected = layer(x), torch.nn.functional.linear(other, weight, bias)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        ours.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert layer.bias.grad is not None


def test_blocks_that_cross_rows_are_read():
    """As transformers writes them where the block size does not divide the row."""
    flat = torch.randn(1, 7 * 100, generator=torch.Generator().manual_seed(0))
    made = round_to_codebook(flat, Scheme(4, 64, codebook="nf4"))
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [7, 100]}
    codes = made.codes.reshape(-1)
    stored = {
        "weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": made.scale.reshape(-1),
        "weight.quant_map": made.codebook,
        STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    layer = CodebookLinear(stored)
    assert torch.equal(layer.dequantize(), made.dequantize().view(7, 100))
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ made.dequantize().view(7, 100).T, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="cross rows"):
        layer.quantized()
    with pytest.raises(InputError, match="no groups of 64"):
        bnb.unpack(stored, Scheme(4, 64, codebook="nf4"))


def test_an_odd_number_of_weights():
    made = tensor(3, 32, 32)
    odd = made.rows(0, 1)
    assert bnb.unpack(bnb.pack(odd), odd.scheme).codes.shape == (1, 32)
    row = round_to_codebook(
        torch.randn(1, 33, generator=torch.Generator().manual_seed(0)), Scheme(4, 64, codebook="nf4")
    )
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1, 33]}
    stored = bnb.pack(row) | {STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}
    assert stored["weight"].shape == (17, 1)
    assert torch.equal(CodebookLinear(stored).dequantize(), row.dequantize())


def test_half_precision_models_keep_the_scales():
    layer = CodebookLinear(bnb.pack(tensor())).to(torch.bfloat16)
    assert layer.absmax.dtype == layer.table.dtype == torch.float32 and layer.codes.dtype == torch.uint8
    assert layer(torch.ones(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


def _state(**values):
    def change(tensors):
        said = json.loads(bytes(tensors[STATE].tolist())) | values
        tensors[STATE] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


def _set(part, value):
    return lambda tensors: tensors.update({part: value(tensors[part])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight"), "weight is missing"),
        (lambda t: t.pop("weight.absmax"), "weight.absmax is missing"),
        (lambda t: t.pop("weight.quant_map"), "weight.quant_map is missing"),
        (lambda t: t.pop(STATE), "quant_state.bitsandbytes__nf4 or __fp4 is missing"),
        (_set(STATE, lambda s: s[:-3]), "not JSON"),
        (_set(STATE, lambda s: torch.tensor([91, 93], dtype=torch.uint8)), "holds a list"),
        (_state(shape=[6]), "shape [6]"),
        (_state(shape=[6, -96]), "shape [6, -96]"),
        (_state(shape=[10**9, 10**9]), "weight has 288 bytes"),
        (_state(shape=[6, 98]), "weight has 288 bytes, expected 294"),
        (_state(blocksize=48), "blocksize 48"),
        (_state(blocksize=64), "weight.absmax has 18 numbers, expected 9"),
        (_state(blocksize="32"), "blocksize '32'"),
        (_state(quant_type="fp4"), "quant_type 'fp4'"),
        (_state(nested_blocksize=0), "nested_blocksize 0"),
        (_state(nested_offset=None), "nested_offset None"),
        (_state(nested_offset=float("nan")), "nested_offset nan"),
        (_state(nested_dtype="float16"), "nested_dtype 'float16'"),
        (_set("weight.nested_absmax", lambda t: t.repeat(2)), "weight.nested_absmax has 2 numbers, expected 1"),
        (_set("weight.nested_absmax", lambda t: t * torch.nan), "not finite"),
        (_set("weight.nested_quant_map", lambda t: t[:-1]), "255 numbers, expected 256"),
        (_set("weight.quant_map", lambda t: t.int()), "not finite numbers"),
        (_set("weight.absmax", lambda t: t.float()), "absmax is torch.float32"),
        (lambda t: t.pop("weight.nested_quant_map"), "nested_quant_map is missing"),
    ],
)
def test_damage_is_named(change, message):
    stored = bnb.pack(tensor(double_quant=True))
    change(stored)
    with pytest.raises(InputError) as caught:
        CodebookLinear(stored)
    assert message in caught.value.message
