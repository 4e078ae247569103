from pathlib import Path

import numpy as np
import pytest
import torch

from onnx_graphs import N, graph_model
from quantcli.errors import InputError
from quantcli.graphs.calibration.moment_stages import levels_of, stages_of
from quantcli.graphs.calibration.partition_runs import Stream
from quantcli.graphs.calibration.second_moments import collect_moments, combine
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.walk.matrices import Selection, find_targets, prepare

RANDOM = np.random.default_rng(0)
A, B = (RANDOM.standard_normal(s).astype(np.float32) for s in ((40, 24), (24, 24)))
NODES = [
    N("MatMul", "x a", "h", "first"),
    N("Relu", "h", "r", "relu"),
    N("MatMul", "r b", "g", "second"),
    N("MatMul", "g b", "y", "third"),
]
FEEDS = [{"x": RANDOM.standard_normal((n, 40)).astype(np.float32)} for n in (5, 3, 8, 1)]
WIDTHS = {"x": 40, "r": 24, "g": 24}


def gather(model, widths, feeds, folder=Path(), held_out_step=0, reference=None):
    """All tensors in one stage."""
    streams = [Stream(m, folder, feeds, [list(widths)]) for m in (model, reference) if m is not None]
    return collect_moments(streams[0], 0, widths, held_out_step, streams[1] if reference is not None else None)


def values(name, feeds):
    found = {"x": np.concatenate([f["x"] for f in feeds])}
    found["r"] = np.maximum(found["x"] @ A, 0)
    found["g"] = found["r"] @ B
    return found[name].astype(np.float64)


def second_moment(*arrays):
    return sum(a.T @ a for a in arrays) / sum(len(a) for a in arrays)


@pytest.mark.parametrize("external", [False, True])
def test_moments_are_those_of_the_tensors(external, tmp_path):
    model = graph_model(NODES, {"a": A, "b": B})
    if external:
        save_graph(model, tmp_path / "model.onnx")
        assert (tmp_path / "model.onnx.data").is_file()
        model = open_graph(tmp_path / "model.onnx")
    found = gather(model, WIDTHS, FEEDS, tmp_path)
    for name in WIDTHS:
        statistics = combine([found[name]])
        np.testing.assert_allclose(statistics.hessian.numpy(), second_moment(values(name, FEEDS)), rtol=1e-4, atol=1e-3)
        assert (statistics.tokens, statistics.held_out) == (17, None)
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_every_third_batch_is_held_out():
    found = gather(graph_model(NODES, {"a": A, "b": B}), {"r": 24}, FEEDS, held_out_step=3)
    statistics = combine([found["r"]])
    train = values("r", [FEEDS[0], FEEDS[1], FEEDS[3]])
    np.testing.assert_allclose(statistics.hessian.numpy(), second_moment(train), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        statistics.held_out.numpy(), second_moment(values("r", FEEDS[2:3])), rtol=1e-4, atol=1e-3
    )
    assert (statistics.tokens, statistics.held_out_tokens) == (9, 8)


def test_a_shared_weight_sees_all_its_inputs():
    found = gather(graph_model(NODES, {"a": A, "b": B}), WIDTHS, FEEDS)
    wanted = second_moment(values("r", FEEDS), values("g", FEEDS))
    both = combine([found["r"], found["g"]])
    np.testing.assert_allclose(both.hessian.numpy(), wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(both.hessian, both.hessian.T)
    assert both.tokens == 34


def test_no_inputs_no_statistics():
    found = gather(graph_model(NODES, {"a": A, "b": B}), WIDTHS, [])
    assert combine([found["r"]]) is None


def test_stages_fit_into_memory():
    widths = {"a": 16, "b": 16, "c": 64, "d": 16}
    assert stages_of(widths, 2 * 8 * 16 * 16) == [["a", "b"], ["c"], ["d"]]
    assert stages_of(widths, 1 << 30) == [["a", "b", "c", "d"]]


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "lack 'x'"),
        ({"x": FEEDS[0]["x"], "z": FEEDS[0]["x"]}, "have 'z'"),
        ({"x": FEEDS[0]["x"][:, :7]}, "does not run on the calibration inputs"),
        ({"x": FEEDS[0]["x"].astype(np.float64)}, "does not run on the calibration inputs"),
    ],
)
def test_wrong_inputs(feed, message):
    with pytest.raises(InputError, match=message):
        gather(graph_model(NODES, {"a": A, "b": B}), {"r": 24}, [feed])


def test_a_reference_gives_cross_moments():
    """Of the same tokens in both graphs, batch by batch, held out or not."""
    other = graph_model(NODES, {"a": A + 0.1, "b": B})
    found = gather(other, {"r": 24}, FEEDS, held_out_step=3, reference=graph_model(NODES, {"a": A, "b": B}))
    statistics = combine([found["r"]])
    changed, kept = (np.maximum(np.concatenate([f["x"] for f in FEEDS]) @ w, 0) for w in (A + 0.1, A))
    train = np.r_[0:8, 16]
    np.testing.assert_allclose(statistics.hessian.numpy(), changed[train].T @ changed[train] / 9, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(statistics.cross.numpy(), kept[train].T @ changed[train] / 9, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(
        statistics.held_out_cross.numpy(), kept[8:16].T @ changed[8:16] / 8, rtol=1e-3, atol=1e-2
    )


def test_levels_follow_the_longest_way():
    nodes = [
        N("MatMul", "x a", "h", "first"),
        N("MatMul", "h b", "g", "second"),
        N("Add", "h g", "s", "skip"),
        N("MatMul", "s b2", "y", "third"),
        N("MatMul", "x a2", "z", "aside"),
        N("Add", "z h", "zh", "add"),
        N("MatMul", "zh b3", "w", "fourth"),
    ]
    model = graph_model(nodes, {"a": A, "a2": A, "b": B, "b2": B, "b3": B}, outputs="y w")
    prepare(model)
    targets, _ = find_targets(model.graph, Selection())
    assert levels_of(model.graph, targets) == [["x"], ["h", "zh"], ["s"]]
