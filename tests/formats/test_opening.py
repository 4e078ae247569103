"""Who opens what: the table against what was measured, and plans that are checked by it."""

import pytest

from quantcli.formats.fused import fused_shards
from quantcli.formats.opening import Contents, StoredLinear, opens_in, why_not
from quantcli.formats.readers import DEFAULT_READERS, READERS
from quantcli.options import FORMATS, GRAPH_READERS, READER_NAMES
from quantcli.scheme import Scheme

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")


def contents(format="gptq", bits=4, group_size=64, symmetric=True, exceptions=None, kept=(), columns=256, **values):
    default = Scheme(bits, group_size, symmetric)
    every = [f"model.layers.{i}.{name}" for i in range(2) for name in NAMES]
    linears = {
        name: StoredLinear((exceptions or {}).get(name, default), 256, columns) for name in every if name not in kept
    }
    blocks = ["model.layers.0", "model.layers.1"]
    return Contents(format, values.pop("model_type", "llama"), default, linears, list(kept), blocks, **values)


def able(found):
    return {name for name, why in opens_in(found).items() if why is None}


def silent(found):
    return {name for name, why in opens_in(found).items() if why is not None and why.silent}


HEAD = StoredLinear(Scheme(4, 64, True), 512, 256)
EIGHT, OTHER = Scheme(8, 64, True), "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("found", "opened", "wrong"),
    [
        (contents(), "tgv", ""),
        (contents(symmetric=False), "tg", ""),
        (contents(bits=3), "tg", ""),
        (contents(bits=8), "tgv", ""),
        (contents(bits=5), "", ""),
        (contents(desc_act=True), "tg", ""),
        (contents(group_size=96), "", ""),
        (contents(group_size=16), "tg", ""),
        (contents(group_size=-1), "gv", "t"),
        (contents(group_size=128, columns=576), "tg", ""),
        (contents(head=HEAD), "gv", "t"),
        (contents(head=StoredLinear(Scheme(4, 64, True), 288, 256)), "g", "t"),
        (contents(exceptions={OTHER: EIGHT}), "gv", ""),
        (contents(exceptions={"model.layers.0.self_attn.q_proj": EIGHT}), "g", ""),
        (contents(kept=[f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]), "tgv", ""),
        (contents(kept=[OTHER]), "gv", ""),
        (contents(kept=[f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]), "tg", ""),
        (contents(kept=[f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkv"]), "tgv", ""),
        (contents(embedding=True), "", ""),
        (contents(model_type="mixtral"), "tv", ""),
        (contents(model_type="phi3"), "tv", ""),
        (contents(model_type="gpt2"), "gv", ""),
        (contents("awq"), "tgv", ""),
        (contents("awq", symmetric=False), "tgv", ""),
        (contents("awq", model_type="phi3"), "tv", "g"),
        (contents("compressed-tensors"), "tv", ""),
        (contents("compressed-tensors", symmetric=False), "v", ""),
        (contents("compressed-tensors", head=HEAD), "tv", ""),
        (contents("compressed-tensors", exceptions={OTHER: EIGHT}), "tv", ""),
        (contents("bnb"), "t", ""),
        (contents("float"), "tgv", ""),
        (contents(online=True), "", ""),
    ],
)
def test_the_table_says_what_was_measured(found, opened, wrong):
    """Of research on vLLM 0.32.0, GPTQModel 7.6.0 and transformers 5.23.0, by their first letters."""
    three = {"t": "transformers", "g": "gptqmodel", "v": "vllm"}
    assert {letter for letter, name in three.items() if name in able(found)} == set(opened)
    assert {letter for letter, name in three.items() if name in silent(found)} == set(wrong)
    assert "quantcli" in able(found)


def test_experts_are_nonsense_in_transformers_as_gptq_alone():
    linears = {"model.layers.0.mlp.experts.0.up_proj": StoredLinear(Scheme(4, 64, True), 256, 256)}
    for format, wrong in (("gptq", {"transformers", "peft"}), ("compressed-tensors", set())):
        found = Contents(format, "qwen3_moe", Scheme(4, 64, True), linears, (), ("model.layers.0",))
        assert silent(found) == wrong


def test_every_obstacle_names_a_change():
    found = contents(bits=3, symmetric=False, group_size=96, desc_act=True, head=HEAD)
    for reader in READERS.values():
        why = why_not(reader, found)
        assert why is None or (why.why and why.change)


def test_names():
    assert tuple(READERS) == READER_NAMES
    assert tuple(name for name, reader in READERS.items() if reader.graphs) == GRAPH_READERS
    assert set(DEFAULT_READERS) < set(READERS)
    assert all(set(reader.formats) <= set(FORMATS) and reader.version for reader in READERS.values())


def test_fused_names_need_all_shards():
    names = ["a.0.self_attn.q_proj", "a.0.self_attn.k_proj", "a.0.self_attn.v_proj", "a.0.mlp.gate_proj", "up_proj"]
    assert fused_shards(names) == {"a.0.self_attn.qkv_proj": tuple(names[:3])}
    assert fused_shards(names[1:]) == {}
    assert fused_shards(["up_proj", "gate_proj"]) == {"gate_up_proj": ("gate_proj", "up_proj")}
