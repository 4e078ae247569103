"""compressed-tensors: golden words, what older writers store, configurations of ours and of others."""

import json

import pytest
import torch

from quantcli.errors import InputError
from quantcli.formats import compressed_config, compressed_tensors
from quantcli.formats.codec import Described
from quantcli.formats.codecs import CODECS
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

CODEC = CODECS["compressed-tensors"]


def described(default, exceptions=None, float_linears=("lm_head",)):
    return Described(
        default, exceptions or {}, [], desc_act=False, head=None, producer="p", float_linears=list(float_linears)
    )


def example(bits, symmetric):
    scheme = Scheme(bits, 16, symmetric)
    codes = torch.arange(16).repeat(2, 1) % scheme.levels
    return QuantizedTensor(
        codes=torch.stack([codes[0], codes[0].flip(0)]).to(torch.uint8),
        scale=torch.tensor([[0.5], [-2.0]], dtype=torch.float16),
        zero=torch.tensor([[scheme.middle], [scheme.middle if symmetric else 1]], dtype=torch.uint8),
        scheme=scheme,
        group=group_index(16, scheme),
    )


def unsigned(words):
    return [[w & 0xFFFFFFFF for w in row] for row in words.tolist()]


def test_golden_words():
    stored = compressed_tensors.pack(example(4, symmetric=False))
    # one row of words per output, eight codes a word from the low bits up; zeros along the outputs
    assert unsigned(stored["weight_packed"]) == [[0x76543210, 0xFEDCBA98], [0x89ABCDEF, 0x01234567]]
    assert unsigned(stored["weight_zero_point"]) == [[0x18]]
    assert stored["weight_scale"].tolist() == [[0.5], [-2.0]]
    assert stored["weight_shape"].tolist() == [2, 16]
    assert {n: t.dtype for n, t in stored.items()} == {
        "weight_packed": torch.int32,
        "weight_scale": torch.float16,
        "weight_shape": torch.int64,
        "weight_zero_point": torch.int32,
    }
    symmetric = compressed_tensors.pack(example(4, symmetric=True))
    assert "weight_zero_point" not in symmetric
    assert torch.equal(symmetric["weight_packed"], stored["weight_packed"])


def test_golden_words_of_three_bits():
    # 16 codes of 3 bits take a word and a half: code 10 straddles the first two
    stored = compressed_tensors.pack(example(3, symmetric=True))
    stream = sum((i % 8) << (3 * i) for i in range(16))
    assert unsigned(stored["weight_packed"])[0] == [stream & 0xFFFFFFFF, stream >> 32]


def test_what_older_writers_store():
    tensor = example(4, symmetric=False)
    stored = compressed_tensors.pack(tensor)
    signed = (tensor.zero.int() - 8).to(torch.int8)
    read = compressed_tensors.unpack(stored | {"weight_zero_point": signed}, tensor.scheme)
    assert torch.equal(read.zero, tensor.zero)
    with pytest.raises(InputError, match="outside of 4 bits"):
        compressed_tensors.unpack(stored | {"weight_zero_point": signed + 20}, tensor.scheme)
    unset = torch.full((16,), -1, dtype=torch.int32)
    assert compressed_tensors.unpack(stored | {"weight_g_idx": unset}, tensor.scheme).ordered
    two = Scheme(4, 8 * 2, False)
    wide = QuantizedTensor(
        codes=torch.arange(32, dtype=torch.uint8).repeat(2, 1) % 16,
        scale=torch.ones(2, 2, dtype=torch.float16),
        zero=torch.tensor([[0, 8], [3, 15]], dtype=torch.uint8),
        scheme=two,
        group=group_index(32, two),
    )
    index = torch.arange(32, dtype=torch.int32) % 2
    read = compressed_tensors.unpack(compressed_tensors.pack(wide) | {"weight_g_idx": index}, two)
    assert torch.equal(read.group, index)
    assert read.dequantize()[1, :4].tolist() == [0 - 3, 1 - 15, 2 - 3, 3 - 15]
    with pytest.raises(InputError, match="weight_g_idx names groups 1 to 2, there are 2"):
        compressed_tensors.unpack(compressed_tensors.pack(wide) | {"weight_g_idx": index + 1}, two)


def test_one_scale_for_the_whole_matrix():
    tensor = example(8, symmetric=True)
    scheme = Scheme(8, -1, True)
    stored = compressed_tensors.pack(tensor) | {"weight_scale": torch.tensor([0.25])}
    read = compressed_tensors.unpack(stored, scheme)
    assert read.dequantize()[0, :3].tolist() == [-32.0, -31.75, -31.5]


def test_configuration_reads_back():
    default, other, row = Scheme(4, 64), Scheme(8, 32, True), Scheme(4, -1)
    config = CODEC.config(described(default, {"a.b": other, "a.d": row, "a.e": other}))
    assert [g["targets"] for g in config["config_groups"].values()] == [["Linear"], ["a.b", "a.e"], ["a.d"]]
    assert config["ignore"] == ["lm_head"]
    for name, scheme in {"a.b": other, "a.e": other, "a.d": row, "a.bb": default, "x.a.b": default}.items():
        assert compressed_config.scheme_of(config, name) == scheme
    with pytest.raises(InputError, match="ignores it"):
        compressed_config.scheme_of(config, "lm_head")
    assert json.loads(json.dumps(config)) == config


def group(targets, weights=None, **more):
    return {
        "targets": targets,
        "weights": {"num_bits": 4, "symmetric": True, "group_size": 32} | (weights or {}),
    } | more


def test_configurations_of_others():
    config = {
        "format": "pack-quantized",
        "config_groups": {
            "group_0": group([r"re:.*down_proj$"], {"num_bits": 8, "strategy": "channel", "group_size": None}),
            "group_1": group(["Linear"], {"actorder": "group", "observer": "mse"}),
            "group_2": group(["Embedding"], {"num_bits": 2, "symmetric": False}),
        },
        "ignore": ["re:.*lm_head", "re:vision.*"],
    }
    scheme_of = compressed_config.scheme_of
    assert scheme_of(config, "model.layers.0.mlp.down_proj") == Scheme(8, -1, True)
    assert scheme_of(config, "model.layers.0.mlp.up_proj") == Scheme(4, 32, True)
    assert scheme_of(config, "model.embed_tokens") == Scheme(2, 32, False)
    for name in ("lm_head", "vision.linear"):
        with pytest.raises(InputError, match="ignores it"):
            scheme_of(config, name)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "strategy": "attn_head"}}, "kv_cache_scheme"),
        ({"kv_cache_scheme": {"num_bits": 8, "strategy": "tensor", "dynamic": True}}, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"format": "marlin-24"}, "of layout 'marlin-24': pack-quantized, int-quantized, float-quantized"),
        ({"config_groups": {"g": group(["Linear"], output_activations={"num_bits": 8})}}, "output_activations too"),
        ({"config_groups": {"g": group(["Linear"], {"type": "float", "num_bits": 6})}}, "floats of 6 bits"),
        ({"config_groups": {"g": group(["Linear"], {"type": "float", "symmetric": False})}}, "with zero points"),
        ({"config_groups": {"g": group(["Linear"], {"strategy": "block"})}}, "block_structure None"),
        ({"config_groups": {"g": group(["Linear"], {"strategy": "attn_head"})}}, "strategy 'attn_head'"),
        ({"config_groups": {"g": group(["other"])}}, "no target"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "no config_groups of schemes"),
        ({"config_groups": None}, "no config_groups of schemes"),
    ],
)
def test_what_is_more_than_packed_weights_is_refused(change, why):
    config = {"format": "pack-quantized", "config_groups": {"g": group(["Linear"])}, "transform_config": {}}
    assert compressed_config.scheme_of(config, "a.b") == Scheme(4, 32, True)
    refused = compressed_config.refuse_config(config | change)
    if refused is None:
        with pytest.raises(InputError) as caught:
            compressed_config.scheme_of(config | change, "a.b")
        refused = caught.value.message
    assert why in refused
