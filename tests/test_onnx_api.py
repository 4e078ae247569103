"""The Python API: a script for onnxruntime's MatMulNBitsQuantizer runs with ours, and its GPTQ is one."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, matmul_bnb4_quantizer, matmul_nbits_quantizer

import quantcli.onnx
from onnx_graphs import N, graph_model
from quantcli.errors import InputError, UsageError
from quantcli.graphs.model.files import save_graph

WIDTH, OUT = 128, 40  # onnxruntime's asymmetric RTN and GPTQ fail on an odd number of blocks
NODES = [
    N("LayerNormalization", "x gain", "n", "norm"),
    N("MatMul", "n a", "h", "first"),
    N("Relu", "h", "r", "relu"),
    N("MatMul", "r b", "y", "head"),
]
THEIRS, OURS = matmul_nbits_quantizer, quantcli.onnx


def float_model():
    random = np.random.default_rng(0)
    weights = {"a": random.standard_normal((WIDTH, WIDTH)), "b": random.standard_normal((WIDTH, OUT))}
    gain = np.exp(random.standard_normal(WIDTH))
    return graph_model(NODES, {n: w.astype(np.float32) for n, w in (weights | {"gain": gain}).items()})


def inputs(count, seed):
    """Correlated inputs: a few directions carry most of the energy."""
    random = np.random.default_rng(seed)
    basis = np.random.default_rng(9).standard_normal((WIDTH, WIDTH)) * np.geomspace(3, 0.05, WIDTH)[:, None]
    return (random.standard_normal((count, WIDTH)) @ basis / WIDTH**0.5).astype(np.float32)


class Reader(CalibrationDataReader):
    def __init__(self):
        self.batches = [{"x": inputs(128, seed)} for seed in range(4)]

    def get_next(self):
        return self.batches.pop() if self.batches else None


def outputs(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def error(quantizer, proto):
    quantizer.process()
    x = inputs(256, 100)
    wanted = outputs(proto, x)
    return float(np.linalg.norm(outputs(quantizer.model.model, x) - wanted) / np.linalg.norm(wanted))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of onnxruntime's HQQ
@pytest.mark.parametrize("library", [THEIRS, OURS], ids=["onnxruntime", "quantcli"])
@pytest.mark.parametrize("name", ["Default", "RTN", "HQQ", "GPTQ"])
def test_one_script_for_both(name, library, tmp_path):
    proto = ir.to_proto(float_model())
    before, plain = proto.SerializeToString(), ir.to_proto(float_model())  # onnxruntime's class changes its input
    arguments = {"Default": {"block_size": 32}, "HQQ": {"block_size": 32, "bits": 4}}.get(name, {})
    if name == "GPTQ":
        arguments = {"calibration_data_reader": Reader(), "percdamp": 0.01, "actorder": False}
    config = getattr(library, f"{name}WeightOnlyQuantConfig")(quant_format=QuantFormat.QOperator, **arguments)
    quantizer = library.MatMulNBitsQuantizer(
        proto,
        bits=4,
        block_size=32,
        is_symmetric=False,
        accuracy_level=0,
        nodes_to_exclude=["head"],
        algo_config=config,
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "m.onnx"), use_external_data_format=False)
    found = onnx.load(str(tmp_path / "m.onnx"))
    if library is OURS or name != "GPTQ":  # onnxruntime's GPTQ does not look at nodes_to_exclude
        assert [n.op_type for n in found.graph.node] == ["LayerNormalization", "MatMulNBits", "Relu", "MatMul"]
    node = next(n for n in found.graph.node if n.op_type == "MatMulNBits")
    assert {a.name: a.i for a in node.attribute if a.name in ("bits", "block_size", "K", "N")} == {
        "bits": 4, "block_size": 32, "K": WIDTH, "N": WIDTH,
    }  # fmt: skip
    x = inputs(8, 3)
    wanted = outputs(plain, x)
    assert np.abs(outputs(found, x) - wanted).max() < 0.3 * np.abs(wanted).max()
    if library is OURS:
        assert proto.SerializeToString() == before
        onnx.checker.check_model(found)


def test_gptq_is_better_than_rtn_here_and_not_there():
    found = {}
    for key, library in (("theirs", THEIRS), ("ours", OURS)):
        for name, arguments in (("RTN", {}), ("GPTQ", {"calibration_data_reader": Reader()})):
            config = getattr(library, f"{name}WeightOnlyQuantConfig")(**arguments)
            quantizer = library.MatMulNBitsQuantizer(ir.to_proto(float_model()), block_size=32, algo_config=config)
            found[key, name] = error(quantizer, ir.to_proto(float_model()))
    assert found["ours", "GPTQ"] < 0.7 * found["ours", "RTN"]
    assert found["ours", "GPTQ"] < 0.7 * found["theirs", "GPTQ"]
    assert found["theirs", "GPTQ"] > 0.99 * found["theirs", "RTN"]


def test_all_algorithms_take_bits_and_formats(tmp_path):
    """A file with external data, 3 bits, per row; of every config the quantizer's scheme is obeyed."""
    save_graph(float_model(), tmp_path / "m.onnx")
    proto, reader = ir.to_proto(float_model()), Reader()
    found = {}
    for name, arguments in {
        "RTN": {},
        "KQuant": {"calibration_data_reader": reader},
        "HQQ": {},
        "GPTQ": {"calibration_data_reader": reader, "settings": {"refit": True}},
        "AWQ": {"calibration_data_reader": reader, "rounder": "gptq", "quant_format": "QDQ"},
    }.items():
        config = getattr(OURS, f"{name}WeightOnlyQuantConfig")(**arguments)
        quantizer = OURS.MatMulNBitsQuantizer(tmp_path / "m.onnx", bits=3, block_size=32, algo_config=config)
        found[name] = error(quantizer, proto)
        assert {(layer.bits, layer.group_size) for layer in quantizer.layers} == {(3, 32)}
        assert [node.op_type for node in quantizer.model.model.graph.node][-1].startswith("MatMul")
    assert {layer.scaled for layer in quantizer.layers} == {True}
    assert [n.op_type for n in quantizer.model.model.graph.node].count("DequantizeLinear") == 2
    assert found["KQuant"] < found["RTN"]
    assert found["GPTQ"] < 0.7 * found["RTN"]
    assert found["AWQ"] < 0.7 * found["RTN"]


@pytest.mark.parametrize("name", ["NF4", "FP4"])
def test_codebooks_equal_those_of_onnxruntime(name):
    """Scales bit for bit, and codes but for the sign of FP4's zero."""
    stored = []
    for library in (matmul_bnb4_quantizer, OURS):
        quantizer = library.MatMulBnb4Quantizer(
            ir.to_proto(float_model()), getattr(OURS.MatMulBnb4Quantizer, name), 32, nodes_to_exclude=["head"]
        )
        quantizer.process()
        graph = quantizer.model.model.graph
        (node,) = [n for n in graph.node if n.op_type == "MatMulBnb4"]
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        stored.append([{a.name: a.i for a in node.attribute if a.i}, *(arrays[name] for name in node.input[1:])])
    theirs, ours = stored
    assert {k: v for k, v in ours[0].items() if k in theirs[0]} == {k: v for k, v in theirs[0].items() if k in ours[0]}
    np.testing.assert_array_equal(ours[2], theirs[2])
    codes = [np.stack([packed >> 4, packed & 15]) for packed in (ours[1], theirs[1])]
    if name == "FP4":
        codes = [np.where(code == 8, 0, code) for code in codes]
    np.testing.assert_array_equal(*codes)


def test_ratios_are_those_of_onnxruntime():
    """By the name of a weight; others keep their range."""
    scales = []
    for library in (THEIRS, OURS):
        config = library.RTNWeightOnlyQuantConfig({"a": 0.8})
        quantizer = library.MatMulNBitsQuantizer(ir.to_proto(float_model()), block_size=32, algo_config=config)
        quantizer.process()
        graph = quantizer.model.model.graph
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        scales.append([arrays[n.input[2]].reshape(-1) for n in graph.node if n.op_type == "MatMulNBits"])
    for theirs, ours in zip(*scales, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    plain = OURS.MatMulNBitsQuantizer(ir.to_proto(float_model()), block_size=32)
    plain.process()
    (whole, other), (cut, same) = (
        [onnx.numpy_helper.to_array(t) for t in m.graph.initializer if t.name.endswith(".scales")]
        for m in (plain.model.model, quantizer.model.model)
    )
    assert np.allclose(cut / whole, 0.8, rtol=2e-3) and np.array_equal(other, same)


def test_nodes_by_name():
    proto = ir.to_proto(float_model())
    config = OURS.RTNWeightOnlyQuantConfig(customized_weight_config={"first": {"bits": 8, "scheme": "sym"}})
    quantizer = OURS.MatMulNBitsQuantizer(proto, block_size=32, algo_config=config)
    quantizer.process()
    assert {layer.name: (layer.bits, layer.symmetric) for layer in quantizer.layers} == {
        "a": (8, True),
        "b": (4, False),
    }
    only = OURS.MatMulNBitsQuantizer(proto, nodes_to_include=["head"])
    only.process()
    assert [layer.name for layer in only.layers] == ["b"]
    assert only.kept == {"a": "not among the included nodes"}


@pytest.mark.parametrize(
    ("config", "arguments", "error", "message"),
    [
        (OURS.GPTQWeightOnlyQuantConfig(), {}, UsageError, "gptq needs calibration inputs"),
        (OURS.GPTQWeightOnlyQuantConfig(object()), {}, InputError, "object is no calibration data reader"),
        (OURS.RTNWeightOnlyQuantConfig({"a": 1.5}), {}, UsageError, "clip_ratio is above 0 and at most 1, got 1.5"),
        (OURS.KQuantWeightOnlyQuantConfig({"a": 0.9}), {}, UsageError, "it takes no ratios"),
        (OURS.HQQWeightOnlyQuantConfig(axis=0), {}, UsageError, "axis 1 only"),
        (OURS.GPTQWeightOnlyQuantConfig(perchannel=False), {}, UsageError, "perchannel=False"),
        (None, {"quant_axes": {"MatMul": 1}}, UsageError, "quant_axes"),
        (None, {"quant_format": "QOp"}, UsageError, "QOperator or QDQ"),
        (None, {"bits": 9}, UsageError, "bits must be 1 to 8, got 9"),
        (
            OURS.RTNWeightOnlyQuantConfig(customized_weight_config={"a": {"bit": 8}}),
            {},
            UsageError,
            "group_size, scheme",
        ),
        (None, {"nodes_to_exclude": ["first", "head"]}, InputError, "no weight to quantize; excluded"),
    ],
)
def test_what_does_not_apply_is_refused(config, arguments, error, message):
    with pytest.raises(error, match=message):
        OURS.MatMulNBitsQuantizer(ir.to_proto(float_model()), algo_config=config, **arguments).process()


def test_a_reader_can_be_used_again():
    reader = Reader()
    config = OURS.GPTQWeightOnlyQuantConfig(reader)
    OURS.MatMulNBitsQuantizer(ir.to_proto(float_model()), algo_config=config).process()
    assert len(reader.batches) == 4
