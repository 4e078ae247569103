"""Graphs of every kind by every method: what comes out is right, or is refused with a name. Nothing else, ever."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from every_method import METHODS, judge
from graph_strategy import Case, graphs
from onnx_corpus import corpus_case, corpus_names

FEW, MANY = 60, 1000
SAME_EACH_TIME = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


CORPUS = corpus_names()
IN_SUITE = (
    "pytorch-operator/test_operator_mm",
    "pytorch-converted/test_Linear",
    "pytorch-converted/test_Conv2d_groups",
)


def check(case: Case) -> None:
    for name, method in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            verdict = judge(case, method, Path(folder))
        assert not verdict.faults, (name, verdict)


@settings(SAME_EACH_TIME, max_examples=FEW)
@given(graphs())
def test_some_graphs(case):
    check(case)


@pytest.mark.large
@pytest.mark.timeout(7200)
@settings(SAME_EACH_TIME, max_examples=MANY)
@given(graphs())
def test_a_thousand_graphs(case):
    check(case)


@pytest.mark.parametrize("name", IN_SUITE)
def test_some_models_of_onnx(name):
    check(corpus_case(name))


@pytest.mark.large
@pytest.mark.parametrize("name", CORPUS)
def test_every_model_of_onnx(name):
    check(corpus_case(name))
