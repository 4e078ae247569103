"""distill against literal references: the gradient of the dequantization formula, and the loop in plain torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.algorithms import ALGORITHMS, find_chain
from quantcli.algorithms.training.distill import DistillOptions, Progressed, rate_at, train
from quantcli.errors import DivergedError, UsageError
from quantcli.models.linear import PackedLinear
from quantcli.models.scaled_product import round_through
from quantcli.pipelines.distilling.divergence import divergence
from quantcli.scheme import PER_CHANNEL, ActivationScheme, Scheme
from quantcli.tensors.activations import InputRounding
from quantcli.tensors.quantized import QuantizedTensor, group_index


def packed(seed, bits, group_size, rows, columns, *, shuffled, dtype=torch.float16):
    random = torch.Generator().manual_seed(seed)
    scheme = Scheme(bits, group_size)
    groups = scheme.group_count(columns)
    group = group_index(columns, scheme)
    if shuffled:
        group = group[torch.randperm(columns, generator=random)]
    return QuantizedTensor(
        codes=torch.randint(0, scheme.levels, (rows, columns), generator=random, dtype=torch.uint8),
        scale=(torch.randn(rows, groups, generator=random) * 0.1).to(dtype),
        zero=torch.randint(0, scheme.levels, (rows, groups), generator=random, dtype=torch.uint8),
        scheme=scheme,
        group=group.contiguous(),
    )


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 99),
    st.integers(2, 8),
    st.sampled_from([16, 48, 64, PER_CHANNEL]),
    st.sampled_from([(7, 96), (32, 80), (300, 64)]),
    st.booleans(),
)
def test_gradients_are_those_of_the_dequantization_formula(seed, bits, group_size, shape, shuffled):
    tensor = packed(seed, bits, group_size, *shape, shuffled=shuffled)
    layer = PackedLinear.from_quantized(tensor)
    scales = layer.train_scales()
    layer.blocks = lambda: [(0, min(5, shape[0])), *([(5, shape[0])] if shape[0] > 5 else [])]
    x = torch.randn(2, 3, shape[1], requires_grad=True)
    back = torch.randn(2, 3, shape[0])
    (layer(x) * back).sum().backward()

    literal_scale = tensor.scale.double().requires_grad_()
    literal_x = x.detach().double().requires_grad_()
    index = tensor.group.long()
    weight = (tensor.codes.double() - tensor.zero.double()[:, index]) * literal_scale[:, index]
    ((literal_x @ weight.T) * back.double()).sum().backward()
    for found, wanted in ((scales.grad.T, literal_scale.grad), (x.grad, literal_x.grad)):
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-6


def test_products_see_scales_as_they_are_stored():
    tensor = packed(0, 4, 32, 16, 64, shuffled=False)
    layer = PackedLinear.from_quantized(tensor)
    x = torch.randn(3, 64)
    before = layer(x)
    scales = layer.train_scales()
    assert (layer(x) - before).abs().max() < 1e-5
    with torch.no_grad():
        scales *= 1 + 2.0**-13  # less than half a step of float16
    assert (layer(x) - before).abs().max() < 1e-5
    with torch.no_grad():
        scales *= 1.01
    stored = QuantizedTensor(tensor.codes, scales.detach().T.half(), tensor.zero, tensor.scheme, tensor.group)
    assert (layer(x) - x @ stored.dequantize().T).abs().max() < 1e-5
    values = torch.tensor([1.0001, -3.3], requires_grad=True)
    round_through(values, torch.bfloat16).sum().backward()
    assert torch.equal(values.grad, torch.ones(2))


def test_inputs_are_rounded_as_the_layer_says():
    layer = PackedLinear.from_quantized(packed(1, 4, 32, 16, 64, shuffled=False))
    layer.rounding = InputRounding(ActivationScheme("int", 4))
    x = torch.randn(3, 64, requires_grad=True)
    wanted = layer(x.detach())
    scales = layer.train_scales()
    found = layer(x)
    assert (found - wanted).abs().max() < 1e-5 < (found - x @ layer.dequantize().T).abs().max()
    found.sum().backward()
    rounded = layer.rounding(x.detach())
    levels = layer.dequantize() / layer.scales.float().T.repeat_interleave(32, 1)
    assert (scales.grad.T - (rounded.sum(0) * levels).reshape(16, 2, 32).sum(-1)).abs().max() < 1e-3
    assert (x.grad - layer.dequantize().sum(0)).abs().max() < 1e-4  # as if x was not rounded


def test_divergence_and_its_gradient_are_the_formula_s():
    logits = torch.randn(150, 37, requires_grad=True)
    wanted = torch.randn(150, 37)
    wanted[:, 3] = -math.inf
    p, log_q = wanted.double().softmax(-1), logits.detach().double().requires_grad_()
    kept = p > 0
    literal = torch.where(kept, p * (torch.where(kept, p, 1).log() - log_q.log_softmax(-1)), 0).sum(-1).mean()
    literal.backward()
    found = divergence(logits, wanted.clone())
    (2 * found).backward()
    assert abs(found.item() - literal.item()) < 1e-6
    assert (logits.grad / 2 - log_q.grad).abs().max() < 1e-8


def literal_adam(values, rates, steps, gradient):
    """AdamW without decay, number by number."""
    values = [float(v) for v in values]
    m, v = [0.0] * len(values), [0.0] * len(values)
    for step in range(steps):
        rise = min(1, (step + 1) / 5) * (1 + math.cos(math.pi * step / steps)) / 2
        for i, g in enumerate(gradient(values)):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.95 * v[i] + 0.05 * g * g
            corrected = m[i] / (1 - 0.9 ** (step + 1)), v[i] / (1 - 0.95 ** (step + 1))
            values[i] -= rates[i] * rise * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)
    return values


TARGETS = [0.3, -2.0, 5.0]


def run(state, steps, until=None, broken_at=None):
    def loss(step):
        if step == until:
            raise KeyboardInterrupt
        value = sum((v - t).square().sum() for v, t in zip(state.values, TARGETS, strict=True))
        value.backward()
        return math.nan if step == broken_at else float(value.detach())

    train(state, [0.01, 0.05, 0.1], steps, loss)


def leaves(values):
    return [torch.tensor([v], requires_grad=True) for v in values]


def test_the_loop_is_adam_with_half_a_cosine():
    state = Progressed.begin(leaves([1.0, 1.0, 1.0]))
    run(state, 40)
    wanted = literal_adam([1.0] * 3, [0.01, 0.05, 0.1], 40, lambda vs: [2 * (vs[i] - TARGETS[i]) for i in range(3)])
    assert [v.item() for v in state.values] == pytest.approx(wanted, rel=1e-5)
    assert len(state.losses) == 40 and state.losses[-1] < 0.7 * state.losses[0]
    assert rate_at(0, 10) == pytest.approx(0.2) and rate_at(9, 10) < 0.03


def test_interrupted_and_continued_it_ends_with_the_same_numbers():
    whole = Progressed.begin(leaves([1.0, 1.0, 1.0]))
    run(whole, 20)
    state = Progressed.begin(leaves([1.0, 1.0, 1.0]))
    with pytest.raises(KeyboardInterrupt):
        run(state, 20, until=7)
    copies = [[t.detach().clone() for t in ts] for ts in (state.values, state.averages, state.squares)]
    again = Progressed([v.requires_grad_() for v in copies[0]], *copies[1:], state.losses)
    run(again, 20)
    assert [v.item() for v in again.values] == [v.item() for v in whole.values]
    assert again.losses == whole.losses


def test_a_loss_that_is_no_number_leaves_the_state_of_the_step_before():
    good = Progressed.begin(leaves([1.0, 1.0, 1.0]))
    with pytest.raises(KeyboardInterrupt):
        run(good, 20, until=6)
    state = Progressed.begin(leaves([1.0, 1.0, 1.0]))
    with pytest.raises(DivergedError, match=r"no longer finite at step 7 of 20 \(loss nan\)"):
        run(state, 20, broken_at=6)
    assert [v.item() for v in state.values] == [v.item() for v in good.values] and len(state.losses) == 6


@pytest.mark.parametrize(
    ("chain", "message", "hint"),
    [
        ("distill,gptq", "distill trains what a rounder has left, nothing can follow it", "-a gptq,distill"),
        ("gptq,distill,distill", "nothing can follow it", "-a gptq,distill"),
        ("quarot,distill", "quarot leaves a float model", "-a quarot,gptq,distill"),
        ("nf4,distill", "nf4 is stored as bnb, float", "-a gptq,distill"),
    ],
)
def test_chains_that_cannot_be(chain, message, hint):
    with pytest.raises(UsageError, match=message) as error:
        find_chain(chain)
    assert hint in error.value.hint


def test_chains_that_can():
    names = {text: [a.name for a in find_chain(text)] for text in ("distill", "awq,distill", "quarot,awq,gptq,distill")}
    assert names == {
        "distill": ["distill"],
        "awq,distill": ["awq", "kquant", "distill"],
        "quarot,awq,gptq,distill": ["quarot", "awq", "gptq", "distill"],
    }
    assert ALGORITHMS["distill"].kind == "trainer"


@pytest.mark.parametrize(
    "values", [{"train_rows": 1}, {"epochs": 0}, {"batch_rows": 0}, {"learning_rate": 0.0}, {"learning_rate": 1.0}]
)
def test_options_that_cannot_be(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        DistillOptions(**values)
