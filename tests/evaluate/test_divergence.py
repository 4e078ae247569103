"""Scores against their definitions, written out in float64 over whole windows."""

import math

import pytest
import torch

from quantcli.errors import InputError
from quantcli.evaluate.divergence import Scores, score_window

T, V = 150, 37  # more than two chunks, not a multiple of one


def windows(count: int, spread: float = 1.0):
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        reference = 3 * torch.randn(T, V, generator=g)
        noise = spread * torch.randn(T, V, generator=g)
        yield torch.randint(0, V, (T,), generator=g), reference + noise, reference


def test_figures_equal_their_definitions():
    scores, losses, reference_losses, divergences, agreements = Scores(), [], [], [], []
    for tokens, logits, reference in windows(3):
        score_window(scores, tokens, logits, reference)
        p = torch.softmax(reference.double()[:-1], 1)
        q = torch.softmax(logits.double()[:-1], 1)
        divergences.append((p * (p / q).log()).sum(1))
        losses.append(-q[torch.arange(T - 1), tokens[1:]].log())
        reference_losses.append(-p[torch.arange(T - 1), tokens[1:]].log())
        agreements.append((p.argmax(1) == q.argmax(1)).double())
    kl = torch.stack(divergences)
    assert scores.perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-6)
    assert scores.reference_perplexity == pytest.approx(math.exp(torch.cat(reference_losses).mean()), rel=1e-6)
    assert scores.kl_mean == pytest.approx(float(kl.mean()), rel=1e-6)
    assert scores.kl_standard_error == pytest.approx(float(kl.mean(1).std()) / math.sqrt(3), rel=1e-5)
    assert scores.top1_agreement == pytest.approx(float(torch.cat(agreements).mean()))
    above = int((kl.flatten() > scores.kl_99th_percentile + 1e-6).sum())
    assert above == math.floor(0.01 * kl.numel())


def test_a_model_agrees_with_itself_exactly():
    scores = Scores()
    for tokens, _, reference in windows(2):
        score_window(scores, tokens, reference, reference)
    assert scores.kl_mean == scores.kl_99th_percentile == scores.kl_standard_error == 0
    assert scores.top1_agreement == 1
    assert scores.perplexity == scores.reference_perplexity


def test_direction_is_reference_first():
    tokens = torch.tensor([0, 0])
    certain, even = torch.tensor([[10.0, 0.0]] * 2), torch.zeros(2, 2)
    scores = Scores()
    score_window(scores, tokens, even, certain)
    assert scores.kl_mean == pytest.approx(math.log(2), abs=1e-3)
    other = Scores()
    score_window(other, tokens, certain, even)
    assert other.kl_mean == pytest.approx(5 - math.log(2), abs=1e-3)


def test_one_window_has_no_standard_error_and_no_reference_no_divergence():
    scores = Scores()
    tokens, logits, reference = next(windows(1))
    score_window(scores, tokens, logits, None)
    assert scores.kl == scores.agrees == []
    again = Scores()
    score_window(again, tokens, logits, reference)
    assert again.kl_standard_error is None
    assert again.perplexity == scores.perplexity


def test_tokens_that_the_reference_excludes():
    tokens = torch.tensor([0, 0, 0])
    reference = torch.tensor([[0.0, -math.inf, 0.0]] * 3)
    scores = Scores()
    score_window(scores, tokens, torch.zeros(3, 3), reference)
    assert scores.kl_mean == pytest.approx(math.log(3 / 2), rel=1e-5)


@pytest.mark.parametrize("who", ["model", "reference"])
def test_logits_that_are_not_numbers(who):
    tokens, logits, reference = next(windows(1))
    (logits if who == "model" else reference)[70, 3] = math.nan
    with pytest.raises(InputError, match=f"the {who} gives logits that are not numbers"):
        score_window(Scores(), tokens, logits, reference)


def test_vocabularies_of_two_sizes():
    tokens, logits, reference = next(windows(1))
    with pytest.raises(InputError, match="vocabulary of 36, the reference of 37"):
        score_window(Scores(), tokens, logits[:, :36], reference)
