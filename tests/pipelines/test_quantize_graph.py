import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import tiny
from onnx_graphs import N, graph_model
from quantcli.errors import InputError, UsageError
from quantcli.graphs.calibration.token_inputs import TokenFeeds
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.options import CaptureOptions, GraphOptions, Override, QuantizeOptions
from quantcli.pipelines import capture
from quantcli.pipelines.quantize_graph import run

WIDTH, OUT = 96, 40
NODES = [
    N("MatMul", "x a", "h", "first"),
    N("Relu", "h", "r", "relu"),
    N("Gemm", "r b bias", "g", "second", {"transB": 1}),
    N("Relu", "g", "s", "relu2"),
    N("Gemm", "s b bias", "t", "again", {"transB": 1}),
    N("MatMul", "t c", "y", "head"),
]


def weights():
    random = np.random.default_rng(0)
    shapes = {"a": (WIDTH, WIDTH), "b": (WIDTH, WIDTH), "bias": (WIDTH,), "c": (WIDTH, OUT)}
    return {n: (random.standard_normal(s) / WIDTH**0.5).astype(np.float32) for n, s in shapes.items()}


def inputs(count, seed):
    """Correlated inputs: a few directions carry most of the energy."""
    random = np.random.default_rng(seed)
    basis = np.random.default_rng(9).standard_normal((WIDTH, WIDTH)) * np.geomspace(3, 0.05, WIDTH)[:, None]
    return (random.standard_normal((count, WIDTH)) @ basis / WIDTH**0.5).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """A folder with one graph, its data file and a side file, and calibration inputs beside it."""
    source = tmp_path / "source"
    source.mkdir()
    model = graph_model(NODES, weights())
    model.metadata_props["made by"] = "a test"
    save_graph(model, source / "net.onnx")
    (source / "labels.txt").write_text("one\ntwo\n")
    (tmp_path / "inputs").mkdir()
    for number in range(8):
        np.savez(tmp_path / "inputs" / f"{number}.npz", x=inputs(64, number))
    return source


def quantize(folder, name="out", graph=None, **options):
    output = folder.parent / name
    chosen = {"algorithm": "rtn", "group_size": 32} | options
    graph = replace(graph or GraphOptions(), min_sqnr=0)  # how far off coarse grids are is what is asked here
    return run(QuantizeOptions(str(folder), output, graph=graph, **chosen))


def outputs(path, x):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def error(folder, output):
    x = inputs(256, 100)
    wanted = outputs(folder / "net.onnx", x)
    return float(np.linalg.norm(outputs(output / "model" / "net.onnx", x) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("algorithm", ["rtn", "kquant", "hqq"])
def test_without_data(algorithm, folder):
    result = quantize(folder, algorithm=algorithm)
    model = result.output / "model"
    assert sorted(p.name for p in model.iterdir()) == ["labels.txt", "net.onnx", "net.onnx.data"]
    graph = open_graph(model / "net.onnx")
    assert graph.metadata_props["made by"] == "a test"
    assert sum(n.op_type == "MatMulNBits" for n in graph.graph) == 4
    assert [layer.name for layer in result.layers] == ["a", "b", "c"]
    assert result.size_bytes < result.parent_size_bytes / 3
    assert 0.01 < error(folder, result.output) < 0.25
    manifest = json.loads((result.output / "quantcli.json").read_text())
    assert (manifest["kind"], manifest["command"]) == ("onnx", "quantize")
    assert manifest["options"]["graph"]["encoding"] == "nbits"
    assert set(manifest["files"]) >= {"model/net.onnx", "model/net.onnx.data", "report.json"}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_far_ahead_of_rtn(bits, folder):
    graph = GraphOptions(calibration_inputs=folder.parent / "inputs")
    rtn = error(folder, quantize(folder, "rtn", bits=bits).output)
    kquant = error(folder, quantize(folder, "kquant", graph, bits=bits, algorithm="kquant").output)
    gptq = error(folder, quantize(folder, "gptq", graph, bits=bits, algorithm="gptq").output)
    best = error(folder, quantize(folder, "best", graph, bits=bits, algorithm=None, preset="best").output)
    assert kquant < 0.95 * rtn
    assert gptq < 0.7 * rtn
    assert best < 1.05 * gptq


@pytest.mark.parametrize("algorithm", ["gptq", "awq,gptq"])
def test_layer_wise_corrects_the_error_of_earlier_matrices(algorithm, folder):
    """At 2 bits, where there is much of it. The first matrix has nothing before it; a norm lets awq scale."""
    plain, layer_wise = (
        GraphOptions(calibration_inputs=folder.parent / "inputs", layer_wise=on) for on in (False, True)
    )
    random = np.random.default_rng(5)
    w = {n: (random.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32) for n in "abcd"}
    nodes = [
        N("LayerNormalization", "x gain", "n", "norm"),
        *(N("MatMul", f"{x} {m}", f"{m}1", m) for x, m in zip(("n", "a1", "b1", "c1"), "abcd", strict=True)),
    ]
    model = graph_model(nodes, w | {"gain": np.ones(WIDTH, np.float32)}, outputs="d1")
    save_graph(model, folder / "net.onnx")
    one = quantize(folder, "plain", plain, bits=2, algorithm=algorithm)
    other = quantize(folder, "layer-wise", layer_wise, bits=2, algorithm=algorithm)
    assert error(folder, other.output) < 0.7 * error(folder, one.output)
    graphs = [open_graph(r.output / "model" / "net.onnx").graph for r in (one, other)]
    first, last = ([g.initializers[f"{n}.qweight"].const_value.numpy() for g in graphs] for n in "ad")
    if algorithm == "gptq":
        np.testing.assert_array_equal(*first)
    assert (last[0] != last[1]).any()


def test_one_stage_after_the_other_gives_the_same_codes(folder):
    """With memory for one Hessian at a time, the graph is run once per tensor."""
    graph = GraphOptions(calibration_inputs=folder.parent / "inputs")
    whole = quantize(folder, "whole", graph, algorithm="gptq")
    staged = quantize(folder, "staged", graph, algorithm="gptq", max_memory=1)
    for name in ("net.onnx", "net.onnx.data"):
        assert (whole.output / "model" / name).read_bytes() == (staged.output / "model" / name).read_bytes()


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 32, False), (4, 32, True), (3, 16, False), (6, -1, True), (8, 32, False)]
)
def test_both_encodings_agree(bits, group_size, symmetric, folder):
    """Three blocks of 32 in a row: asymmetric zero points of an odd number of blocks; 8 bits are really stored."""
    scheme = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    one, other = (quantize(folder, e, GraphOptions(encoding=e), **scheme) for e in ("nbits", "qdq"))
    x = inputs(32, 5)
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    path = str(other.output / "model" / "net.onnx")
    (found,) = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(found, outputs(one.output / "model" / "net.onnx", x), atol=1e-4)
    for result in (one, other):
        graph = open_graph(result.output / "model" / "net.onnx").graph
        read = {str(v.name) for node in graph for v in node.inputs if v is not None}
        assert set(graph.initializers) <= read
        weights = WIDTH * (2 * WIDTH + OUT)
        stored = sum(v.const_value.nbytes for n, v in graph.initializers.items() if n.endswith(".qweight"))
        assert stored == weights * (4 if bits <= 4 else 8) // 8
        spare = (4 if bits <= 4 else 8) - bits
        assert result.information_bits_per_weight == pytest.approx(result.bits_per_weight - spare)


@pytest.mark.parametrize(("bits", "opset"), [(2, 25), (3, 21), (8, 21)])
def test_an_older_graph_is_converted_to_the_opset_that_has_the_encoding(bits, opset, folder):
    model = graph_model([*NODES[:4], N("Softmax", "s", "t", "softmax", {"axis": 0}), NODES[-1]], weights(), opset=11)
    model.ir_version, model.metadata_props["made by"] = 6, "a test"
    save_graph(model, folder / "net.onnx")
    old, new = (quantize(folder, e, GraphOptions(encoding=e), bits=bits) for e in ("nbits", "qdq"))
    assert old.conversion is None
    assert (new.conversion["before"], new.conversion["after"]) == (11, opset) and new.conversion["difference"] < 1e-6
    assert json.loads((new.output / "report.json").read_text())["conversion"] == new.conversion
    path = new.output / "model" / "net.onnx"
    written = onnx.load(path, load_external_data=False)
    assert (written.opset_import[0].version, written.ir_version) == (opset, {21: 10, 25: 13}[opset])
    assert [(p.key, p.value) for p in written.metadata_props] == [("made by", "a test")]
    onnx.checker.check_model(str(path))
    x = inputs(32, 5)
    np.testing.assert_allclose(outputs(path, x), outputs(old.output / "model" / "net.onnx", x), atol=1e-4)


def test_the_plan_says_that_the_graph_will_be_converted(folder):
    save_graph(graph_model(NODES, weights(), opset=12), folder / "net.onnx")
    plan = quantize(folder, graph=GraphOptions(encoding="qdq"), dry_run=True)
    assert ("opset", "12, converted to 21") in plan.rows()


@pytest.mark.parametrize(("algorithm", "settings"), [("nf4", {}), ("fp4", {}), ("hqq", {"zero": "float"})])
def test_codebooks_and_fractions(algorithm, settings, folder):
    result = quantize(folder, algorithm=algorithm, settings=settings)
    graph = open_graph(result.output / "model" / "net.onnx").graph
    operator = "MatMulNBits" if algorithm == "hqq" else "MatMulBnb4"
    assert sum(n.op_type == operator for n in graph) == 4
    assert 0.01 < error(folder, result.output) < 0.3
    if algorithm == "hqq":
        whole = quantize(folder, "whole", algorithm="hqq")
        assert error(folder, result.output) < error(folder, whole.output)
        assert graph.initializers["a.zeros"].dtype == ir.DataType.FLOAT


def test_awq_with_nothing_to_scale_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_graph(graph_model([N("MatMul", "x a", "y", "n")], {"a": weights()["a"]}), source / "net.onnx")
    np.savez(tmp_path / "0.npz", x=inputs(8, 0))
    with pytest.raises(InputError, match="awq can scale none of the graph's 1 tensors"):
        quantize(source, graph=GraphOptions(calibration_inputs=tmp_path / "0.npz"), algorithm="awq")


def test_one_bit_and_kernels(tmp_path):
    """One bit with fractions as zero points; Conv as the graph's other operator, by QDQ."""
    source, random = tmp_path / "source", np.random.default_rng(2)
    source.mkdir()
    k = random.standard_normal((32, 16, 3, 3)).astype(np.float32)
    nodes = [N("Conv", "x k", "y", "conv", {"pads": [1, 1, 1, 1]}), N("MatMul", "x2 a", "y2", "product")]
    model = graph_model(nodes, {"k": k, "a": weights()["a"]}, "x x2", "y y2", ranks={"x": 4, "y": 4})
    save_graph(model, source / "net.onnx")
    one = quantize(source, "one", bits=1, algorithm="hqq", settings={"zero": "float"})
    assert one.kept == {"k": "Conv is not among the operators to quantize"}
    assert one.bits_per_weight == pytest.approx(2 + 64 / 32)
    assert one.information_bits_per_weight == pytest.approx(1 + 64 / 32)
    both = quantize(
        source, "both", GraphOptions(encoding="qdq", op_types=("MatMul", "Conv")), bits=8, algorithm="kquant"
    )
    assert {layer.name: layer.relative_error < 1e-4 for layer in both.layers} == {"k": True, "a": True}
    feed = {"x": random.standard_normal((1, 16, 8, 8)).astype(np.float32), "x2": inputs(4, 1)}
    paths = (source / "net.onnx", both.output / "model" / "net.onnx")
    wanted, found = (onnxruntime.InferenceSession(str(p)).run(None, feed) for p in paths)
    np.testing.assert_allclose(found[0], wanted[0], atol=0.02 * np.abs(wanted[0]).max())
    with pytest.raises(UsageError, match="Conv has no operator with quantized weights"):
        quantize(source, "none", GraphOptions(op_types=("Conv",)), bits=8, algorithm="kquant")


def test_selection_and_overrides(folder):
    graph = GraphOptions(quantize_last_matmul=False, accuracy_level=4)
    result = quantize(folder, graph=graph, overrides=(Override("^b$", bits=8),))
    assert {layer.name: layer.bits for layer in result.layers} == {"a": 4, "b": 8}
    assert result.kept == {"c": "a last product"}
    nodes = [n for n in open_graph(result.output / "model" / "net.onnx").graph if n.op_type == "MatMulNBits"]
    assert {n.attributes["accuracy_level"].as_int() for n in nodes} == {4}


def test_the_range_of_some_matrices(folder):
    whole = quantize(folder, "whole", algorithm="rtn", bits=8)
    cut = quantize(folder, "cut", algorithm="rtn", bits=8, overrides=(Override("^b$", clip_ratio=0.5),))
    for before, after in zip(whole.layers, cut.layers, strict=True):
        worse = after.relative_error / before.relative_error
        assert worse > 100 if after.name == "b" else worse == 1


def test_a_file_alone(folder):
    output = folder.parent / "alone"
    run(QuantizeOptions(str(folder / "net.onnx"), output, algorithm="rtn"))
    assert sorted(p.name for p in (output / "model").iterdir()) == ["net.onnx", "net.onnx.data"]


@pytest.mark.parametrize(
    ("options", "graph", "message"),
    [
        ({"algorithm": "gptq"}, {}, "calibration inputs are needed: the graph's inputs are x"),
        ({"algorithm": "rtn"}, {"calibration_inputs": Path("x")}, "rtn uses no calibration inputs"),
        ({"algorithm": "nf4"}, {"encoding": "qdq"}, "DequantizeLinear has no codebook"),
        ({"algorithm": "nf4"}, {"op_types": ("MatMul", "Gather")}, "nf4 is for MatMulBnb4, which multiplies"),
        ({"algorithm": "nf4", "settings": {"double_quant": "true"}}, {}, "double_quant does not apply"),
        ({"algorithm": "nf4"}, {"accuracy_level": 4}, "is an attribute of MatMulNBits"),
        ({"algorithm": "awq,gptq"}, {}, "calibration inputs are needed"),
        ({"algorithm": "quarot,gptq"}, {}, "quarot does not apply"),
        ({"algorithm": "rtn"}, {"layer_wise": True}, "--layer-wise runs the graph on calibration inputs, rtn has none"),
        ({"format": "gptq"}, {}, "--format is for checkpoints"),
        ({"algorithm": "hqq", "settings": {"zero": "float"}}, {"encoding": "qdq"}, "zero=float does not apply to Deq"),
        ({"algorithm": "hqq", "settings": {"zero": "float"}, "bits": 5}, {}, "zero=float is for 1 to 4 bits, not 5"),
        ({"algorithm": "hqq", "settings": {"zero": "float"}, "group_size": 40}, {}, "needs groups of whole blocks"),
    ],
)
def test_what_does_not_apply_is_refused(options, graph, message, folder):
    with pytest.raises(UsageError, match=message):
        quantize(folder, graph=GraphOptions(**graph), **options)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["inputs", "source"]


def test_bad_input(folder):
    broken = folder.parent / "broken"
    broken.mkdir()
    with pytest.raises(InputError, match="0 ONNX graphs"):
        quantize(broken)
    (broken / "net.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match="is not an ONNX graph"):
        quantize(broken)
    save_graph(ir.Model(graph_model([N("Relu", "x", "y", "r")], {}).graph, ir_version=10), broken / "net.onnx")
    with pytest.raises(InputError, match="has no weight to quantize"):
        quantize(broken)
    (folder.parent / "inputs" / "0.npz").write_bytes(b"PK no archive")
    with pytest.raises(InputError, match=r"0\.npz is not an \.npz file"):
        quantize(folder, graph=GraphOptions(calibration_inputs=folder.parent / "inputs"), algorithm="gptq")
    data = folder / "net.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(InputError, match="which is shorter"):
        quantize(folder)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("exporter", ["genai", "torch"])
def test_a_captured_language_model(exporter, tmp_path):
    """Its graph, cache and custom operators included, is quantized with statistics of tokens, and still generates."""
    tiny.checkpoint(tmp_path / "m", tie_word_embeddings=False)
    capture.run(CaptureOptions(str(tmp_path / "m"), tmp_path / "float", exporter=exporter))
    source = tmp_path / "float" / "model"
    rows = torch.randint(0, tiny.VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    (tmp_path / "inputs").mkdir()
    decoder = json.loads((source / "genai_config.json").read_text())["model"]["decoder"]
    feeds = TokenFeeds(open_graph(source / "model.onnx").graph, rows, axes={"kv_cache_dim": decoder["head_size"]})
    for number, feed in enumerate(feeds):
        np.savez(tmp_path / "inputs" / f"{number}.npz", **feed)
    graph = GraphOptions(
        op_types=("MatMul", "Gather"), quantize_last_matmul=False, calibration_inputs=tmp_path / "inputs"
    )
    result = run(QuantizeOptions(str(tmp_path / "float"), tmp_path / "q", algorithm="gptq", group_size=32, graph=graph))
    assert all(layer.relative_error < layer.rtn_relative_error for layer in result.layers if layer.tokens)
    assert sum(layer.tokens == 0 for layer in result.layers) == 1  # the embedding, a table
    assert {p.name for p in source.iterdir()} == {p.name for p in (tmp_path / "q" / "model").iterdir()}
    import onnxruntime_genai as og

    model = og.Model(str(tmp_path / "q" / "model"))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=12, min_length=12)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([[1, 2, 3]], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) == 12


NORMED = [
    N("LayerNormalization", "x gain", "n", "norm"),
    N("MatMul", "n a", "h", "first"),
    N("Relu", "h", "r", "relu"),
    N("MatMul", "r b", "y", "second"),
]


def test_awq_scales_and_is_better_without_more_bits(tmp_path):
    """Some channels are much larger than others, as in language models."""
    source, random = tmp_path / "source", np.random.default_rng(1)
    source.mkdir()
    (tmp_path / "inputs").mkdir()
    gain = np.exp(random.standard_normal(WIDTH) * 1.5).astype(np.float32)
    save_graph(graph_model(NORMED, {"gain": gain, "a": weights()["a"] / 10, "b": weights()["c"]}), source / "net.onnx")
    for number in range(4):
        np.savez(tmp_path / "inputs" / f"{number}.npz", x=inputs(128, number))
    graph = GraphOptions(calibration_inputs=tmp_path / "inputs")
    plain = quantize(source, "plain", graph, bits=3, algorithm="kquant")
    found = {"kquant": error(source, plain.output)}
    found["rtn"] = error(source, quantize(source, "rtn", bits=3).output)
    for name in ("awq,rtn", "awq", "awq,gptq"):
        result = quantize(source, name, graph, bits=3, algorithm=name)
        assert {layer.name: layer.scaled for layer in result.layers} == {"a": True, "b": True}
        assert result.size_bytes == plain.size_bytes
        found[name] = error(source, result.output)
        manifest = json.loads((result.output / "quantcli.json").read_text())
        assert manifest["options"]["algorithm"] == ("awq,kquant" if name == "awq" else name)
    assert found["awq,rtn"] < 0.9 * found["rtn"]
    assert found["awq"] < found["kquant"]
    assert found["awq,gptq"] < 0.8 * found["awq"], found
