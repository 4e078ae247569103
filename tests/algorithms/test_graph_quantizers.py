import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import small_graphs
from quantcli.algorithms import ALGORITHMS, KEEP_FLOAT, find_chain, make_options
from quantcli.errors import InputError, UsageError
from quantcli.graphs.activations.unfit import Grid, find_unfit
from quantcli.graphs.calibration.tensor_ranges import Ranges

SHAPES = {"cnn": (4, 3, 12, 12), "mlp": (4, 32), "separable": (4, 3, 8, 8), "attention": (4, 6, 16)}


class Reader:
    """onnxruntime's protocol, by duck typing."""

    def __init__(self, kind, count=8, seed=0):
        r = np.random.default_rng(seed)
        self.left = [{"x": r.normal(size=SHAPES[kind]).astype(np.float32)} for _ in range(count)]

    def get_next(self):
        return self.left.pop() if self.left else None


def run(path, x):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def size(path):
    return sum(p.stat().st_size for p in path.parent.glob(path.name + "*"))


def quantize(tmp_path, kind, name, reader=None, build=None, cache=None, **settings):
    """The error of a quantized graph relative to the float one's outputs, what became of it, and its file."""
    source, target = tmp_path / "float.onnx", tmp_path / "out" / "model.onnx"
    target.parent.mkdir(exist_ok=True)
    getattr(small_graphs, kind)(source, **(build or {}))
    algorithm = ALGORITHMS[name]
    options = make_options(algorithm, {k: str(v).lower() if isinstance(v, bool) else v for k, v in settings.items()})
    extra = [cache] if cache else []
    result = algorithm.run(source, target, options, reader or (Reader(kind) if name == "static" else None), *extra)
    x = Reader(kind, 1, seed=99).get_next()["x"]
    before, after = run(source, x), run(target, x)
    return float(np.linalg.norm(after - before) / np.linalg.norm(before)), result, target


@pytest.mark.parametrize("name", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_the_result_runs_is_close_and_smaller(kind, name, tmp_path):
    error, result, target = quantize(tmp_path, kind, name, build={"hidden": 256} if kind == "mlp" else {})
    assert error < 0.04
    assert set(result.quantized) == ({"conv1", "conv2", "head"} if kind == "cnn" else {"up", "down"})
    assert not result.kept
    onnx.checker.check_model(str(target), full_check=name == "static")
    graph = ir.load(target).graph
    assert [v.name for v in graph.inputs] == ["x"] and [v.name for v in graph.outputs] == ["y"]
    assert all(v.uses() for v in graph.initializers.values())
    assert all(v.dtype is not ir.DataType.FLOAT or np.prod(v.shape) < 300 for v in graph.initializers.values())
    assert sorted(p.name for p in target.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    weights = [v.const_value.nbytes for v in graph.initializers.values() if v.dtype is ir.DataType.UINT8]
    floats = [
        v.const_value.nbytes for v in ir.load(tmp_path / "float.onnx").graph.initializers.values() if len(v.shape) > 1
    ]
    assert sum(weights) < 0.27 * sum(floats) + 100
    if kind == "mlp":
        assert size(target) < 0.6 * size(tmp_path / "float.onnx")


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
@pytest.mark.parametrize("encoding", ["qdq", "qoperator"])
def test_every_calibrator_with_both_encodings(encoding, method, tmp_path):
    error, result, target = quantize(tmp_path, "cnn", "static", encoding=encoding, calibrate_method=method)
    assert error < 0.04 and result.samples == 8
    kinds = {n.op_type for n in ir.load(target).graph}
    assert ("DequantizeLinear" in kinds and "Conv" in kinds) if encoding == "qdq" else "QLinearConv" in kinds


@pytest.mark.parametrize(("weight", "activation", "limit"), [
    ("int16", "int16", 2e-3), ("int16", "uint16", 2e-3), ("uint8", "uint16", 0.02), ("uint4", "uint8", 0.2),
    ("int4", "uint16", 0.2), ("int8", "int8", 0.04),
])  # fmt: skip
def test_other_types(weight, activation, limit, tmp_path):
    error, _, target = quantize(tmp_path, "mlp", "static", weight_type=weight, activation_type=activation)
    assert error < limit
    graph = ir.load(target).graph
    stored = {v.dtype.name.lower() for v in graph.initializers.values() if len(v.shape) == 2}
    assert stored == {weight}


@pytest.mark.parametrize(("kind", "name"), [("cnn", "static"), ("mlp", "static"), ("mlp", "dynamic")])
def test_scales_per_channel_help_uneven_channels(kind, name, tmp_path):
    # at 16-bit activations, or the activations' error would hide that of the weights
    types = {"activation_type": "uint16"} if name == "static" else {}
    one, *_ = quantize(tmp_path, kind, name, build={"uneven": True}, **types)
    each, *_ = quantize(tmp_path, kind, name, build={"uneven": True}, per_channel=True, **types)
    assert each < 0.7 * one


def rounded_outputs(target):
    """Names of the nodes whose output is made an integer."""
    return {n.inputs[0].producer().name for n in ir.load(target).graph if n.op_type == "QuantizeLinear"
            and n.inputs[0].producer() is not None}  # fmt: skip


@pytest.mark.parametrize("mask", [-1e4, float(np.finfo(np.float32).min)])
def test_nodes_that_a_mask_goes_through_stay_float(mask, tmp_path):
    error, result, target = quantize(tmp_path, "attention", "static", build={"mask": mask})
    assert error < 0.05
    (note,) = [n for n in result.notes if "stay float" in n and "mask" in n]
    assert all(name in note for name in ("choose (Where)", "add (Add)", "softmax (Softmax)"))
    assert not set(result.reasons) & {"q", "k", "v", "out"}
    assert set(result.quantized) == {"q", "k", "v", "out"}
    # what is rounded behind the softmax is between 0 and 1
    assert not rounded_outputs(target) & {"choose", "add"}


def test_a_large_range_is_no_mask_where_it_goes_both_ways_or_no_softmax_reads_it(tmp_path):
    model = ir.load(small_graphs.attention(tmp_path / "m.onnx"))

    def unfit(values):
        return set(find_unfit(model, list(model.graph), Ranges(values, 1), Grid()).reasons)

    for values in ({"sm": (-5000.0, 900.0)}, {"s": (-5000.0, 1.0)}, {"sm": (-900.0, 0.0)}):
        assert not unfit(values)
    assert unfit({"sm": (-5000.0, 9.0), "s": (-9.0, 9.0)}) == {"add", "softmax"}


def test_products_in_front_of_floats_are_not_rounded(tmp_path):
    _, _, target = quantize(tmp_path, "mlp", "static", op_types="MatMul")
    assert rounded_outputs(target) == {"relu"}
    _, _, target = quantize(tmp_path, "mlp", "static")
    assert "up" in rounded_outputs(target)


def test_sums_and_norms_of_a_transformer_stay_float_unless_asked_for(tmp_path):
    error, _, target = quantize(tmp_path, "attention", "static", build={"norm": True})
    assert error < 0.05
    assert "residual" not in rounded_outputs(target)
    _, _, target = quantize(tmp_path, "attention", "static", build={"norm": True}, op_types="MatMul,Add")
    assert "residual" in rounded_outputs(target)


def test_equalized_layers_need_one_scale_only(tmp_path):
    plain, result, _ = quantize(tmp_path, "separable", "static")
    assert not result.equalized
    equal, result, _ = quantize(tmp_path, "separable", "static", equalize=True)
    assert result.equalized[0] == ("first", "depthwise") and len(result.equalized) == 4
    assert equal < 0.25 * plain
    _, result, _ = quantize(tmp_path, "cnn", "static", equalize=True)
    assert result.equalized == (("conv1", "conv2"), ("conv2", "head"))
    with pytest.raises(UsageError, match="no neighbouring layers to equalize"):
        b = small_graphs.Builder("n", 32)
        y = b.node("MatMul", [b.x, b.weight("w", np.ones((32, 4), np.float32))], "y", "only")
        options = make_options(ALGORITHMS["static"], {"equalize": "true"})
        ALGORITHMS["static"].run(b.save(tmp_path / "f.onnx", y), tmp_path / "q.onnx", options, Reader("mlp"))


def test_nodes_and_operators_are_chosen(tmp_path):
    _, result, target = quantize(tmp_path, "cnn", "static", op_types="Conv", nodes_exclude="conv2")
    assert result.quantized == ("conv1",) and set(result.kept) == {"conv2", "head"}
    graph = ir.load(target).graph
    fed = {n.name: n.inputs[1].producer() is not None for n in graph if n.name in ("conv1", "conv2", "head")}
    assert fed == {"conv1": True, "conv2": False, "head": False}
    _, result, _ = quantize(tmp_path, "cnn", "dynamic", nodes_include="^he")
    assert result.quantized == ("head",)
    with pytest.raises(UsageError, match="no node that can be quantized is called 'hed', did you mean 'head'"):
        quantize(tmp_path, "cnn", "dynamic", nodes_include="hed")
    with pytest.raises(UsageError, match="Cnov nodes cannot be quantized, did you mean 'Conv'"):
        quantize(tmp_path, "cnn", "static", op_types="Cnov")
    with pytest.raises(UsageError, match="no node is left"):
        quantize(tmp_path, "cnn", "static", op_types="Gemm", nodes_exclude="head")


def test_gemms_that_share_a_weight_stay_right(tmp_path):
    """onnxruntime's own rewriting transposes it twice."""
    r = np.random.default_rng(0)
    b = small_graphs.Builder("n", 32)
    w = b.weight("w", r.normal(size=(32, 32)).astype(np.float32) / 6)
    # the name that the split one's weight would have is taken
    y = b.node("Gemm", [b.x, w], "h", "w", transB=1, alpha=0.5)
    w.name = "w.weight"
    y = b.node("Gemm", [y, w, b.weight("c", r.normal(size=32).astype(np.float32))], "h2", "second", transB=1, alpha=0.5)
    source = b.save(tmp_path / "f.onnx", b.node("Gemm", [y, w], "y", "third"))
    ALGORITHMS["dynamic"].run(source, tmp_path / "q.onnx", ALGORITHMS["dynamic"].options())
    x = r.normal(size=(5, 32)).astype(np.float32)
    assert np.linalg.norm(run(tmp_path / "q.onnx", x) - run(source, x)) < 0.05 * np.linalg.norm(run(source, x))


def test_a_gemm_with_a_transposed_input_is_split(tmp_path):
    r = np.random.default_rng(0)
    b = small_graphs.Builder(8, 32)
    y = b.node("Gemm", [b.x, b.weight("w", r.normal(size=(8, 4)).astype(np.float32))], "y", "odd", transA=1)
    source = b.save(tmp_path / "f.onnx", y)
    result = ALGORITHMS["dynamic"].run(source, tmp_path / "q.onnx", ALGORITHMS["dynamic"].options())
    assert result.quantized == ("odd",)
    x = r.normal(size=(8, 32)).astype(np.float32)
    assert np.linalg.norm(run(tmp_path / "q.onnx", x) - run(source, x)) < 0.05 * np.linalg.norm(run(source, x))


def test_the_cache_stands_in_for_samples(tmp_path):
    cache = tmp_path / "ranges.json"
    first, result, target = quantize(tmp_path, "mlp", "static", cache=cache)
    data = (target.read_bytes(), (target.parent / "model.onnx.data").read_bytes())
    empty = Reader("mlp", 0)
    again, result, target = quantize(tmp_path, "mlp", "static", empty, cache=cache)
    assert again == first and result.samples == 8
    assert data == (target.read_bytes(), (target.parent / "model.onnx.data").read_bytes())
    with pytest.raises(InputError, match="measured with another method"):
        quantize(tmp_path, "mlp", "static", empty, cache=cache, calibrate_method="entropy")
    with pytest.raises(UsageError, match="there are none"):
        ALGORITHMS["static"].run(tmp_path / "float.onnx", target, ALGORITHMS["static"].options(), None)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("static", {"calibrate_method": "distribution"}, "ranges for float8"),
        ("static", {"percentile": "99"}, "no effect with minmax"),
        ("static", {"encoding": "qoperator", "weight_type": "int4"}, "take 8 bits, not int4"),
        ("static", {"encoding": "qoperator", "activation_type": "int16"}, "take 8 bits, not int16"),
        ("static", {"activation_type": "int8"}, "no int8 activations with uint8 weights"),
        ("static", {"weight_type": "int4", "reduce_range": "true"}, "no effect on int4"),
        ("static", {"calibrate_method": "entropy", "activation_type": "uint16"}, "a search for 8 bits"),
        ("dynamic", {"weight_type": "int4"}, "weight_type is one of uint8, int8"),
    ],
)
def test_what_would_have_no_effect_or_fail_is_refused(name, settings, message):
    with pytest.raises(UsageError, match=message):
        make_options(ALGORITHMS[name], settings)


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_weights_that_may_overflow_are_pointed_out(name, tmp_path):
    for settings, noted in (
        ({"weight_type": "int8"}, True),
        ({"weight_type": "int8", "reduce_range": True}, False),
        ({}, False),
    ):
        error, result, _ = quantize(tmp_path, "cnn", name, **settings)
        assert any("VNNI" in note for note in result.notes) is noted
        assert noted or error < 0.03


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_graphs_in_float16_are_refused(name, tmp_path):
    with pytest.raises(InputError, match="node 'up' computes in float16"):
        quantize(tmp_path, "mlp", name, build={"half": True})


def test_dynamic_conv_has_no_scales_per_channel(tmp_path):
    with pytest.raises(UsageError, match="per_channel would have no effect on conv1"):
        quantize(tmp_path, "cnn", "dynamic", per_channel=True)


def test_what_may_stand_before_graph_quantizers():
    assert find_chain("static") == [ALGORITHMS["static"]]
    assert find_chain("smoothquant,dynamic", "onnx") == [ALGORITHMS["smoothquant"].on_graphs, ALGORITHMS["dynamic"]]
    assert find_chain("smoothquant", "onnx")[-1] is ALGORITHMS["static"]
    assert find_chain("smoothquant") == [ALGORITHMS["smoothquant"], KEEP_FLOAT]
    with pytest.raises(UsageError, match="awq is for weights that are rounded one by one, static takes a whole graph"):
        find_chain("awq,static", "onnx")
    with pytest.raises(UsageError, match="static rounds, nothing can follow it"):
        find_chain("static,gptq")
    with pytest.raises(UsageError, match="smoothquant is for integer activations, gptq"):
        find_chain("smoothquant,gptq", "onnx")


def test_checkpoints_are_refused_with_the_way_to_a_graph(tmp_path):
    from quantcli.options import QuantizeOptions
    from quantcli.pipelines.quantize import run as quantize_checkpoint

    for name in ("dynamic", "static"):
        with pytest.raises(UsageError, match=f"{name} quantizes ONNX graphs, not checkpoints") as caught:
            quantize_checkpoint(QuantizeOptions(model=str(tmp_path), output=tmp_path / "out", algorithm=name))
        assert "capture-onnx-graph" in caught.value.hint
