"""The GPTQ codec: golden tensors, round trips over awkward shapes, and what a configuration says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.errors import InputError
from quantcli.formats import gptq
from quantcli.formats.codec import Described
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index


def random_tensor(n: int, k: int, scheme: Scheme, seed: int = 0, shuffled: bool = False) -> QuantizedTensor:
    g = torch.Generator().manual_seed(seed)
    groups = scheme.group_count(k)
    group = group_index(k, scheme)
    return QuantizedTensor(
        codes=torch.randint(0, scheme.levels, (n, k), dtype=torch.uint8, generator=g),
        scale=torch.randn(n, groups, generator=g).half(),
        zero=torch.randint(scheme.lowest_zero, scheme.levels, (n, groups), dtype=torch.uint8, generator=g),
        scheme=scheme,
        group=group[torch.randperm(k, generator=g)] if shuffled else group,
    )


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    for name in ("codes", "scale", "zero", "group"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_golden_tensors():
    scheme = Scheme(4, 16, lowest_zero=1)
    tensor = QuantizedTensor(
        codes=torch.stack([torch.arange(16), 15 - torch.arange(16)]).to(torch.uint8),
        scale=torch.tensor([[0.5], [-2.0]], dtype=torch.float16),
        zero=torch.tensor([[8], [1]], dtype=torch.uint8),
        scheme=scheme,
        group=torch.zeros(16, dtype=torch.int32),
    )
    packed = gptq.pack(tensor)
    assert list(packed) == list(gptq.PARTS)
    words = [[w & 0xFFFFFFFF for w in row] for row in packed["qweight"].tolist()]
    assert words == [[0x76543210, 0x89ABCDEF], [0xFEDCBA98, 0x01234567]]
    assert packed["qzeros"].tolist() == [[0x07]]  # zero - 1: 7 in the low nibble, 0 in the next
    assert packed["scales"].tolist() == [[0.5, -2.0]]
    assert packed["scales"].dtype == torch.float16
    assert packed["g_idx"].tolist() == [0] * 16
    assert packed["g_idx"].dtype == torch.int32
    assert tensor.dequantize()[0, :2].tolist() == [-4.0, -3.5]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(gptq.BITS),
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    group_size=st.sampled_from([-1, 16, 24, 64, 128]),
    shuffled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_round_trip(bits, n, k, group_size, shuffled, seed):
    scheme = Scheme(bits, group_size, lowest_zero=1)
    tensor = random_tensor(n, k, scheme, seed, shuffled)
    assert_same(gptq.unpack(gptq.pack(tensor), scheme), tensor)


def test_without_column_index():
    scheme = Scheme(4, 32, lowest_zero=1)
    tensor = random_tensor(8, 64, scheme)
    packed = gptq.pack(tensor)
    del packed["g_idx"]
    assert_same(gptq.unpack(packed, scheme), tensor)


def test_version_1_wraps_and_version_2_does_not():
    scheme = Scheme(4, 32, lowest_zero=1)
    packed = gptq.pack(random_tensor(8, 32, scheme))
    packed["qzeros"] = torch.full_like(packed["qzeros"], -1)  # fifteen everywhere
    assert gptq.unpack(packed, scheme, version=1).zero.unique().tolist() == [0]
    assert gptq.unpack(packed, scheme, version=2).zero.unique().tolist() == [15]


def test_zero_points_that_version_1_cannot_hold():
    tensor = random_tensor(8, 32, Scheme(4, 32))
    tensor.zero[0, 0] = 0
    with pytest.raises(AssertionError, match="zero points of 1 or more"):
        gptq.pack(tensor)


def test_shapes_and_groups_that_do_not_fit():
    scheme = Scheme(4, 32, lowest_zero=1)
    packed = gptq.pack(random_tensor(8, 64, scheme))
    with pytest.raises(InputError, match=r"qweight has shape \[7, 8\], expected \[8, 8\]"):
        gptq.unpack(packed | {"qweight": packed["qweight"][:-1]}, scheme)
    with pytest.raises(InputError, match="g_idx names groups 1 to 2, there are 2"):
        gptq.unpack(packed | {"g_idx": packed["g_idx"] + 1}, scheme)


def test_configuration_and_schemes():
    default, other = Scheme(4, 64, symmetric=True), Scheme(8, 32)
    config = gptq.config_for(
        Described(
            default, {"a.b": other}, ["a.c"], desc_act=False, head="lm_head", producer="quantcli:0", damp_percent=0.01
        )
    )
    assert config["quant_method"] == config["checkpoint_format"] == "gptq"
    assert (config["bits"], config["group_size"], config["sym"], config["lm_head"]) == (4, 64, True, True)
    assert config["damp_percent"] == 0.01
    assert gptq.scheme_of(config, "a.b") == other
    assert gptq.scheme_of(config, "a.c") is None
    # a name is matched whole, and its dots are dots
    for name in ("a.bb", "axb", "x.a.b", "a.c.d"):
        assert gptq.scheme_of(config, name) == default
    assert "dynamic" not in gptq.config_for(Described(default, {}, [], desc_act=False, head=None, producer="p"))


def test_dynamic_rules_of_others():
    config = {"bits": 4, "group_size": 128, "sym": True, "dynamic": {r".*\.down_proj": {"bits": 8}, r"-:.*gate.*": {}}}
    assert gptq.scheme_of(config, "model.layers.0.mlp.down_proj") == Scheme(8, 128, symmetric=True)
    assert gptq.scheme_of(config, "model.layers.0.mlp.gate_proj") is None
    assert gptq.scheme_of(config, "model.layers.0.mlp.up_proj") == Scheme(4, 128, symmetric=True)
