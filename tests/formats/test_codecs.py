"""What every codec owes: what it packs reads back the same, sizes are as planned, and what it cannot hold it says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.errors import InputError
from quantcli.formats import awq
from quantcli.formats.codec import Described, Held
from quantcli.formats.codecs import CODECS
from quantcli.options import FORMATS
from quantcli.scheme import FLOATS, Scheme
from quantcli.tensors import floats
from quantcli.tensors.codebook import codebook
from quantcli.tensors.quantized import QuantizedTensor, group_index
from quantcli.tensors.vectorwise import SCHEME

PACKED = [c for c in CODECS.values() if c.unpack is not None and c.name != "gguf"]  # which has a test of its own
BITS = range(1, 9)
# outputs and inputs: one word, many, a multiple of neither the group nor the pack word, odd, a single one
SHAPES = [(8, 32), (64, 128), (150, 256), (64, 96), (24, 72), (9, 50), (33, 35), (40, 1), (1, 160), (6, 16)]
GROUPS = [16, 24, 32, -1]


def scheme_for(codec, bits, group, symmetric):
    """The scheme in the codec's own kind of levels, where it has one of that width; the one that it fixes."""
    if codec.name == "bnb-int8":
        return SCHEME
    if codec.layout is not None:
        sizes = codec.layout.group_sizes
        return codec.layout.weights(group if group in sizes else sizes[bits % len(sizes)])
    return Scheme(bits, group, symmetric, codec.lowest_zero, "nf4" if codec.codebooks and bits == 4 else None)


def random_tensor(rows, columns, scheme, seed=0, shuffled=False):
    rng = np.random.default_rng(seed)
    groups = scheme.group_count(columns)
    zero = (
        np.full((rows, groups), scheme.middle)
        if scheme.symmetric
        else rng.integers(scheme.lowest_zero, scheme.levels, (rows, groups))
    )
    sign = rng.choice([-1, 1], (rows, groups)) if scheme.symmetric else 1
    group = group_index(columns, scheme)
    if scheme.codebook is not None:
        zero = np.zeros_like(zero)
    if scheme.codebook in FLOATS:
        return random_floats(rng, rows, columns, scheme, group[rng.permutation(columns)] if shuffled else group)
    return QuantizedTensor(
        codes=torch.from_numpy(rng.integers(0, scheme.levels, (rows, columns)).astype(np.uint8)),
        scale=torch.from_numpy((sign * (0.01 + rng.random((rows, groups)))).astype(np.float16)).to(
            torch.float16 if scheme.codebook is None else torch.float32
        ),
        zero=torch.from_numpy(zero.astype(np.uint8)),
        scheme=scheme,
        group=group[torch.from_numpy(rng.permutation(columns))] if shuffled else group,
        codebook=None if scheme.codebook is None else codebook(scheme.codebook),
    )


def random_floats(rng, rows, columns, scheme, group):
    """On a grid of small floats, with what a layout may store beside it."""
    values = floats.values(scheme.codebook)
    known = np.flatnonzero(np.isfinite(values.numpy()))
    blocks = torch.from_numpy(0.01 + rng.random((-(-rows // scheme.block_rows), scheme.group_count(columns)))).float()
    divisor = torch.tensor([37.5]) if scheme.scale == "e4m3" else None
    scale = floats.stored(blocks, scheme, divisor).repeat_interleave(scheme.block_rows, 0)[:rows]
    return QuantizedTensor(
        codes=torch.from_numpy(rng.choice(known, (rows, columns)).astype(np.uint8)),
        scale=scale,
        zero=torch.zeros(scale.shape, dtype=torch.uint8),
        scheme=scheme,
        group=group,
        codebook=values,
        divisor=divisor,
    )


def holds(codec, tensor):
    rows, columns = tensor.shape
    return codec.why_not(Held(rows, columns, tensor.scheme, is_default=True, ordered=tensor.ordered)) is None


def same(read, tensor):
    return all(torch.equal(getattr(read, name), getattr(tensor, name)) for name in ("codes", "scale", "zero", "group"))


def check_round_trip(codec, tensor):
    stored = codec.pack(tensor)
    size = sum(t.numel() * t.element_size() for n, t in stored.items() if n != "weight_global_scale")
    assert size == codec.packed_bytes(*tensor.shape, tensor.scheme)
    assert all(t.is_contiguous() for t in stored.values())
    read = codec.unpack(stored, tensor.scheme)
    assert same(read, tensor)
    assert torch.equal(read.dequantize(), tensor.dequantize())


def test_the_options_name_every_format():
    assert tuple(CODECS) == FORMATS


@pytest.mark.parametrize("codec", PACKED, ids=lambda c: c.name)
@pytest.mark.parametrize("shuffled", [False, True], ids=["ordered", "shuffled"])
def test_every_width_and_awkward_shape_round_trips_or_is_refused(codec, shuffled):
    held = []
    for bits in BITS:
        for rows, columns in SHAPES:
            for group in GROUPS:
                for symmetric in (False, True):
                    if 1 << bits <= codec.lowest_zero:
                        continue
                    scheme = scheme_for(codec, bits, group, symmetric)
                    tensor = random_tensor(rows, columns, scheme, bits, shuffled)
                    if holds(codec, tensor):
                        check_round_trip(codec, tensor)
                        held.append(tensor.ordered)
    assert any(held), "it holds nothing"


@pytest.mark.parametrize("codec", PACKED, ids=lambda c: c.name)
@given(
    bits=st.integers(1, 8), rows=st.integers(1, 50), columns=st.integers(1, 200),
    group=st.sampled_from([16, 24, 32, -1]), symmetric=st.booleans(), shuffled=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_round_trip_or_refusal(codec, bits, rows, columns, group, symmetric, shuffled, seed):
    scheme = scheme_for(codec, bits, group, symmetric)
    tensor = random_tensor(rows, columns, scheme, seed, shuffled)
    if holds(codec, tensor):
        check_round_trip(codec, tensor)


def damages(tensor):
    """A stored tensor as a broken file might have it."""
    yield "missing", None
    yield "one axis more", tensor[None]
    if tensor.ndim:
        yield "empty", tensor[:0]
    for axis in range(tensor.ndim):
        yield f"axis {axis} cut", tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        yield f"axis {axis} longer", torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
    if tensor.is_floating_point():
        yield "whole numbers", tensor.to(torch.int32)
        yield "nan", torch.full_like(tensor, torch.nan)
        if tensor.itemsize > 1:  # FP8 has none
            yield "infinite", torch.full_like(tensor, torch.inf)
    else:
        yield "floats", tensor.float()
        yield "another width", tensor.to(torch.int64 if tensor.dtype != torch.int64 else torch.int16)
        if tensor.ndim < 2:
            yield "far", torch.full_like(tensor, 100)
            yield "negative", torch.full_like(tensor, -2)


@pytest.mark.parametrize("codec", PACKED, ids=lambda c: c.name)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_damaged_tensors_are_input_errors(codec, symmetric):
    tensor = random_tensor(24, 64, scheme_for(codec, 4, 32, symmetric))
    assert holds(codec, tensor)
    if codec.layout is not None:
        tensor = replace(tensor, input_scale=torch.tensor([0.5]))
    stored = codec.pack(tensor)
    refused = set()
    for name, part in stored.items():
        for what, broken in damages(part):
            parts = {n: t for n, t in stored.items() if n != name} | ({} if broken is None else {name: broken})
            try:
                read = codec.unpack(parts, tensor.scheme)
            except InputError as error:
                assert any(n in error.message for n in stored), error.message
                refused.add(name)
            else:  # what can be done without, as the index of columns in order; or a shape that no model expects
                assert same(read, tensor) or read.shape != tensor.shape, f"{name}: {what}"
    assert refused == set(stored)


@pytest.mark.parametrize("codec", PACKED, ids=lambda c: c.name)
def test_bits_that_the_config_gets_wrong(codec):
    tensor = random_tensor(24, 64, scheme_for(codec, 4, 32, False))
    stored = codec.pack(tensor)
    for scheme in (Scheme(4, 16), Scheme(4, -1)):
        with pytest.raises(InputError):
            codec.unpack(stored, scheme)


def test_float_is_the_dequantized_weight():
    tensor = random_tensor(5, 48, Scheme(3, 16))
    (weight,) = CODECS["float"].pack(tensor).values()
    assert torch.equal(weight, tensor.dequantize())


@pytest.mark.parametrize(
    ("codec", "held", "why"),
    [
        ("awq", Held(8, 64, Scheme(3, 32), True, True), "4 bits, not 3"),
        ("awq", Held(9, 64, Scheme(4, 32), True, True), "multiple of 8 outputs"),
        ("awq", Held(8, 72, Scheme(4, 32), True, True), "do not divide 72"),
        ("awq", Held(8, 64, Scheme(4, 32), False, True), "one scheme"),
        ("awq", Held(8, 64, Scheme(4, 32), True, False), "neighbouring columns"),
        ("awq", Held(8, 64, Scheme(4, 32), True, True), None),
        ("awq", Held(8, 72, Scheme(4, -1), True, True), None),
        ("gptq", Held(8, 64, Scheme(1, 32), True, True), "2 to 8 bits, not 1"),
        ("gptq", Held(9, 72, Scheme(3, 32), False, False), None),
        ("compressed-tensors", Held(9, 72, Scheme(4, 32), True, True), "do not divide 72"),
        ("compressed-tensors", Held(9, 64, Scheme(4, 32), True, False), "neighbouring columns"),
        ("compressed-tensors", Held(9, 64, Scheme(4, 32), True, True, transposed=True), "Conv1D"),
        ("compressed-tensors", Held(9, 35, Scheme(3, -1), False, True), None),
        ("compressed-tensors", Held(9, 64, Scheme(1, 32), False, True), None),
        ("compressed-tensors", Held(9, 64, Scheme(4, 32, codebook="nf4"), False, True), "not a codebook"),
        ("gptq", Held(9, 64, Scheme(4, 32, codebook="fp4"), False, True), "not a codebook"),
        ("float", Held(9, 64, Scheme(4, 32, codebook="fp4"), False, True), None),
        ("gptq", Held(9, 64, SCHEME, True, True), "not a codebook"),
        ("bnb", Held(9, 64, SCHEME, True, True), "nf4 and fp4"),
        ("bnb-int8", Held(9, 64, SCHEME, True, True, transposed=True), None),
        ("bnb-int8", Held(9, 64, SCHEME, True, True, expert=True), "--exclude"),
        ("bnb-int8", Held(9, 64, Scheme(8, -1, True), True, True), "-a llm-int8 makes them"),
        ("bnb-int8", Held(9, 64, Scheme(4, 32, codebook="nf4"), True, True), "-a llm-int8 makes them"),
    ],
)
def test_what_a_format_cannot_hold(codec, held, why):
    said = CODECS[codec].why_not(held)
    assert (said is None) if why is None else why in said


@pytest.mark.parametrize("codec", PACKED, ids=lambda c: c.name)
def test_fractions_of_zero_points_are_refused_where_they_cannot_be_held(codec):
    tensor = random_tensor(8, 64, Scheme(4, 32, False, codec.lowest_zero))
    held = Held(8, 64, tensor.scheme, True, True, float_zeros=True)
    if not codec.float_zeros:
        assert "whole zero points" in codec.why_not(held)


def test_awq_golden_words():
    scheme = Scheme(4, 16)
    tensor = QuantizedTensor(
        codes=torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 16).contiguous(),
        scale=torch.ones(8, 1, dtype=torch.float16),
        zero=torch.full((8, 1), 15, dtype=torch.uint8),
        scheme=scheme,
        group=group_index(16, scheme),
    )
    stored = awq.pack(tensor)
    assert stored["qweight"].tolist() == [[0x75316420]] * 16
    assert stored["qzeros"].tolist() == [[-1]]
    assert stored["scales"].shape == (1, 8)


def test_awq_config_reads_back():
    scheme = Scheme(4, 128)
    kept = ["m.0.attn.o", "m.1.attn.o", "m.0.mlp.up", "m.1.mlp.gate"]
    quantized = ["m.1.mlp.up", "m.0.mlp.gate_x"]
    config = awq.CODEC.config(Described(scheme, {}, kept, False, False, "p", quantized=quantized))
    assert awq.scheme_of(config) == scheme
    # the name within a block where it says enough: not where another block has it quantized, nor as part of a name
    assert config["modules_to_not_convert"] == ["attn.o", "m.0.mlp.up", "m.1.mlp.gate"]
    assert [p.replace("\\", "") for p in config["dynamic"]] == [f"-:^{name}$" for name in kept]
    config = awq.CODEC.config(Described(scheme, {}, [], False, False, "p"))
    assert config["modules_to_not_convert"] is None
    assert "dynamic" not in config
