"""Every kind of graph that trips quantizers, in every integer format: right to so many dB, or refused by name."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import odd_graphs
from quantcli.algorithms import ALGORITHMS, make_options
from quantcli.errors import InputError, UsageError

FORMATS = {
    "dynamic": ("dynamic", {}),
    "qdq": ("static", {}),
    "operators": ("static", {"encoding": "qoperator"}),
}
ENOUGH_DB = 16.0
"""Of 8 bits; a product with one column, or a channel's average, is near 18."""


class Reader:
    def __init__(self, feed, count=8):
        self.samples = [feed(100 + k) for k in range(count)]
        self.rewind()

    def get_next(self):
        return next(self.left, None)

    def rewind(self):
        self.left = iter(self.samples)


def signal_to_noise(before, after, feeds):
    """The worst output's, in dB."""
    sums = {}
    first, second = (ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]) for p in (before, after))
    for feed in feeds:
        for output, x, y in zip(first.get_outputs(), first.run(None, feed), second.run(None, feed), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype and np.isfinite(y).all()
            sums.setdefault(output.name, np.zeros(2))
            sums[output.name] += np.square(x.astype(float)).sum(), np.square(x.astype(float) - y).sum()
    return min(200.0 if not noise else 10 * np.log10(signal / noise) for signal, noise in sums.values())


def quantize(tmp_path, name, algorithm, settings):
    made, feed = odd_graphs.KINDS[name]()
    source, target = tmp_path / "float.onnx", tmp_path / "out" / "integers.onnx"
    target.parent.mkdir()
    onnx.save(made, source)
    options = make_options(ALGORITHMS[algorithm], settings)
    result = ALGORITHMS[algorithm].run(source, target, options, Reader(feed) if algorithm == "static" else None)
    return result, signal_to_noise(source, target, [feed(900 + k) for k in range(4)])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("encoding", FORMATS)
@pytest.mark.parametrize("name", odd_graphs.KINDS)
def test_the_result_is_right(name, encoding, per_channel, tmp_path):
    algorithm, settings = FORMATS[encoding]
    try:
        result, decibels = quantize(tmp_path, name, algorithm, settings | {"per_channel": str(per_channel).lower()})
    except UsageError as error:
        assert encoding == "dynamic"
        assert "per_channel would have no effect on" in error.message or (
            error.message.startswith("no node is left to quantize") and "transpose" in name.lower()
        )
        return
    except InputError as error:
        # what cannot be, is refused with the node's name
        assert name == "vector" or "stays float" in error.message, error.message
        return
    assert decibels > ENOUGH_DB
    assert result.quantized
    # nothing stays float unsaid
    for kept in result.kept:
        assert any(kept in note and " float" in note for note in result.notes)


@pytest.mark.parametrize("encoding", FORMATS)
@pytest.mark.parametrize(("name", "nodes"), [
    ("branches", {"first", "same", "same_1", "out"}),
    ("loop", {"n_s0", "bm", "n_y"}),
    ("loop_with_a_branch_and_a_list", {"n_s0", "bm", "same", "same_1", "n_y"}),
    ("scan", {"n_h", "n_o"}),
    ("functions", 2),
])  # fmt: skip
def test_bodies_and_functions_are_quantized_inside(name, nodes, encoding, tmp_path):
    algorithm, settings = FORMATS[encoding]
    result, _ = quantize(tmp_path, name, algorithm, settings)
    if isinstance(nodes, int):
        assert len(result.quantized) == nodes and not result.kept
    else:
        assert len(result.quantized) == len(nodes)
    floats = [
        tensor
        for graph in _graphs(onnx.load(tmp_path / "out" / "integers.onnx").graph)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1
    ]
    assert not floats


def _graphs(graph):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def test_nodes_in_bodies_are_chosen_by_name(tmp_path):
    result, _ = quantize(tmp_path, "loop", "static", {"nodes_exclude": "bm"})
    assert result.kept == ("bm",) or "bm" in result.kept
    (tmp_path / "only").mkdir()
    result, _ = quantize(tmp_path / "only", "loop", "dynamic", {"nodes_include": "bm"})
    assert result.quantized == ("bm",)


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_ranges_in_bodies_with_other_methods(method, tmp_path):
    result, decibels = quantize(tmp_path, "loop_with_a_branch_and_a_list", "static", {"calibrate_method": method})
    assert decibels > ENOUGH_DB
    assert any(f"not by {method}" in note for note in result.notes)


def test_batches_of_weights_have_one_scale_where_others_do_not_run(tmp_path):
    result, _ = quantize(tmp_path, "batch_of_weights_4x64x48", "static", {"per_channel": "true"})
    assert any("n_y: one scale for a batch of matrices" in note for note in result.notes)


@pytest.mark.parametrize("name", ["loop", "mask_Where_-inf", "gemm_11", "clip_of_relu6", "batch_of_weights_4x64x48"])
def test_losses_of_nodes_are_measured(name, tmp_path):
    for index, (algorithm, settings) in enumerate(FORMATS.values()):
        (tmp_path / str(index)).mkdir()
        made, feed = odd_graphs.KINDS[name]()
        onnx.save(made, tmp_path / "float.onnx")
        options = make_options(ALGORITHMS[algorithm], settings)
        target = tmp_path / str(index) / "q.onnx"
        result = ALGORITHMS[algorithm].run(tmp_path / "float.onnx", target, options, Reader(feed), None, True)
        assert result.comparison.nodes and all(node.own_db > 30 for node in result.comparison.nodes)


def test_a_loop_that_never_ran_stays_float_and_is_named(tmp_path):
    result, _ = quantize(tmp_path, "loop_of_no_round", "static", {})
    assert set(result.quantized) == {"n_s0", "n_y"} and result.kept == ("bm",)
    assert "never computed" in result.reasons["bm"]
    assert any("bm (MatMul)" in note and "never computed" in note for note in result.notes)


def test_a_channel_whose_bias_is_large_gets_a_larger_scale(tmp_path):
    result, decibels = quantize(tmp_path, "bias_beyond_int32_Conv", "static", {"per_channel": "true"})
    assert result.quantized == ("n_y",) and decibels > 30
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match=r"n_y \(Conv\) stays float: its bias does not fit into int32"):
        quantize(tmp_path / "one", "bias_far_beyond_int32", "static", {})
