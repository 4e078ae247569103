"""Weights alone, in every place where a graph can have them: the result runs, and is near the float graph."""

import numpy as np
import onnx
import onnxruntime
import pytest
from tests.text_graphs import text_proto

from quantcli.errors import InputError
from quantcli.options import CalibrationOptions, GraphOptions, QuantizeOptions
from quantcli.pipelines import quantize_graph

onnxruntime.set_default_logger_severity(3)
RANDOM = np.random.default_rng(0)
NAMES = tuple("wvuabc")
X = RANDOM.standard_normal((8, 64)).astype(np.float32)
IF = """(float[4,64] x) => (float[4,48] y) {{
    s = ReduceSum<keepdims: int = 0>(x) c = Greater(s, zero)
    a = If<then_branch = th () => (float[] t) {{ {then} }}, else_branch = el () => (float[] e) {{ {other} }}>(c)
    y = Tanh(a) }}"""


def weight(*shape):
    return (RANDOM.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)


ZERO = {"zero": np.float32(0)}
GRAPHS = {
    "if with weights of its own": (
        IF.format(then="[mt] t = MatMul(x, w)", other="[me] e = MatMul(x, w)"),
        ZERO,
        {"th": {"w": weight(64, 48)}, "el": {"w": weight(64, 48)}},
        2,
    ),
    "if with weights of the outer graph": (
        IF.format(then="[mt] t = MatMul(x, w)", other="[me] q = MatMul(x, w) e = Relu(q)"),
        ZERO | {"w": weight(64, 48)},
        {},
        1,
    ),
    "if in an if": (
        IF.format(
            then="""[mt] p = MatMul(x, w)
            t = If<then_branch = in1 () => (float[] t1) { [deep] t1 = MatMul(p, v) },
                   else_branch = in2 () => (float[] t2) { t2 = Relu(p) }>(c)""",
            other="[me] e = MatMul(x, w)",
        ),
        ZERO | {"w": weight(64, 48)},
        {"in1": {"v": weight(48, 48)}},
        2,
    ),
    "if with a cast and a constant": (
        IF.format(
            then="w32 = Cast<to: int = 1>(w) [mt] t = MatMul(x, w32)",
            other="wt = Transpose<perm = [1,0]>(v) [me] e = MatMul(x, wt)",
        ),
        ZERO,
        {"th": {"w": weight(64, 48).astype(np.float16)}, "el": {"v": weight(48, 64)}},
        2,
    ),
    "gemm in a branch": (
        IF.format(
            then="[mt] t = Gemm<alpha: float = 0.5, beta: float = 2.0, transB: int = 1>(x, w, b)",
            other="[me] e = Gemm(x, v)",
        ),
        ZERO,
        {"th": {"w": weight(48, 64), "b": weight(1, 48)}, "el": {"v": weight(64, 48)}},
        2,
    ),
    "loop": (
        """(float[4,64] x) => (float[4,48] y) {
        [first] s = MatMul(x, v)
        y = Loop<body = bd (int64 i, bool go, float[4,48] st) => (bool on, float[4,48] nx) {
            on = Identity(go) [bm] m = MatMul(st, w) nx = Tanh(m) }>(three, yes, s) }""",
        {"three": np.int64(3), "yes": np.bool_(True), "v": weight(64, 48)},
        {"bd": {"w": weight(48, 48)}},
        2,
    ),
    "scan": (
        """(float[4,64] x) => (float[4,48] y) {
        s, y = Scan<num_scan_inputs: int = 1, body = bd (float[48] st, float[64] row) => (float[48] nx, float[48] out) {
            r = Unsqueeze(row, ax) [bm] m = MatMul(r, w) q = Squeeze(m, ax) h = Add(q, st) nx = Tanh(h)
            out = Identity(nx) }>(start, x) }""",
        {"start": np.zeros(48, np.float32), "ax": np.array([0])},
        {"bd": {"w": weight(64, 48)}},
        1,
    ),
    "function": (
        """(float[4,64] x) => (float[4,48] y) { [f1] a = own.Linear(x, w) [f2] b = own.Linear(a, v) y = Tanh(b) }
        <domain: "own", opset_import: ["" : 21]> Linear (p, q) => (o) { [inner] m = MatMul(p, q) o = Relu(m) }""",
        {"w": weight(64, 48), "v": weight(48, 48)},
        {},
        2,
    ),
    "function in a branch": (
        IF.format(then="t = own.Linear(x, w)", other="[me] e = MatMul(x, v)")
        + """<domain: "own", opset_import: ["" : 21]> Linear (p, q) => (o) { [inner] m = MatMul(p, q) o = Relu(m) }""",
        ZERO | {"w": weight(64, 48), "v": weight(64, 48)},
        {},
        2,
    ),
    "main and body": (
        IF.format(then="[mt] t = MatMul(k, w)", other="[me] e = Relu(k)")
        .replace("s = Reduce", "[out] k = MatMul(x, v) [two] k2 = MatMul(k, w) s = Reduce", 1)
        .replace("y = Tanh(a)", "d = Add(a, k2) y = Tanh(d)"),
        ZERO | {"v": weight(64, 48), "w": weight(48, 48)},
        {},
        2,
    ),
    "one name in two scopes": (
        IF.format(then="[m] q = MatMul(x, w) t = Relu(q)", other="[m] q = MatMul(x, w) e = Relu(q)").replace(
            "y = Tanh(a)", "[m] r = MatMul(a, w0) y = Tanh(r)"
        ),
        ZERO | {"w0": weight(48, 48)},
        {"th": {"w": weight(64, 48)}, "el": {"w": weight(64, 48)}},
        3,
    ),
    "an input that is an output": (
        "(float[4,64] x) => (float[4,48] y, float[4,64] x) { [m] y = MatMul(x, w) }",
        {"w": weight(64, 48)},
        {},
        1,
    ),
    "dead rows": (
        "(float[4,64] x) => (float[4,48] y) { [m] y = MatMul(x, w) }",
        {"w": weight(64, 48) * (np.arange(48) % 3 > 0)},
        {},
        1,
    ),
    "one row": ("(float[4,64] x) => (float[4,1] y) { [m] y = MatMul(x, w) }", {"w": weight(64, 1)}, {}, 1),
    "one column": (
        "(float[4,64] x) => (float[4,48] y) { k = ReduceSum<keepdims: int = 1>(x, ax) [m] y = MatMul(k, w) }",
        {"w": weight(1, 48), "ax": np.array([1])},
        {},
        1,
    ),
    "an initializer of no size": (
        "(float[4,64] x) => (float[4,48] y) { [m] a = MatMul(x, w) y = Concat<axis: int = 1>(a, none) }",
        {"w": weight(64, 48), "none": np.zeros((4, 0), np.float32)},
        {},
        1,
    ),
    "empty optional inputs": (
        "(float[4,64] x) => (float[4,48] y) { [m] a = Gemm(x, w, ) y = Clip(a, , six) }",
        {"w": weight(64, 48), "six": np.float32(6)},
        {},
        1,
    ),
    "a weight that is an input too": (
        "(float[4,64] x, float[64,48] w) => (float[4,48] y) { [m] y = MatMul(x, w) }",
        {"w": weight(64, 48)},
        {},
        1,
    ),
}
STACKS = {
    "a stack": ("(float[4,64] x) => (float[] y) { k = Unsqueeze(x, ax) [m] y = MatMul(k, w) }", (3, 64, 48)),
    "a stack of stacks": ("(float[4,64] x) => (float[] y) { [m] y = MatMul(x, w) }", (2, 3, 64, 5)),
    "a stack of columns": ("(float[4,64] x) => (float[] y) { [m] y = MatMul(x, w) }", (3, 64, 1)),
}
METHODS = ["rtn", "kquant", "hqq", "nf4", "gptq", "awq"]


class Told:
    """What was said."""

    def __init__(self):
        self.said = []

    def __getattr__(self, name):
        return getattr(quantize_graph.Silent(), name)

    def warn(self, text):
        self.said.append(text)

    def note(self, text):
        self.said.append(text)


def quantize(folder, proto, method, **graph):
    folder.mkdir(exist_ok=True)
    onnx.save(proto, str(folder / "m.onnx"))
    data, samples = {}, CalibrationOptions()
    if method in ("gptq", "awq"):
        np.savez(folder / "in.npz", x=X)
        data, samples = {"calibration_inputs": folder / "in.npz"}, CalibrationOptions(batch_size=4, num_samples=2)
    bits = {} if method == "nf4" else {"bits": 8}
    grid = {} if method == "dynamic" else {"group_size": 16}
    told = Told()
    options = QuantizeOptions(
        str(folder / "m.onnx"),
        folder / "out",
        algorithm=method,
        graph=GraphOptions(**data, **graph),
        calibration=samples,
        **bits,
        **grid,
    )
    return quantize_graph.run(options, told), told.said


def signal_to_noise(folder, proto):
    one = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    other = onnxruntime.InferenceSession(str(folder / "out/model/m.onnx"), providers=["CPUExecutionProvider"])
    signal = noise = 1e-20
    for sign in (1, -1):  # both branches
        feed = {"x": sign * (X[:4] + np.float32(0.3))}
        for wanted, found in zip(one.run(None, feed), other.run(None, feed), strict=True):
            signal, noise = signal + float((wanted**2).sum()), noise + float(((wanted - found) ** 2).sum())
    return 10 * np.log10(signal / noise)


def proto_of(kind):
    text, weights, bodies, _ = GRAPHS[kind]
    return text_proto(text, weights, bodies, opset=21, ir_version=10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", GRAPHS)
def test_weights_wherever_they_are(kind, method, tmp_path):
    proto, count = proto_of(kind), GRAPHS[kind][3]
    if method == "nf4" and kind == "one column":
        pytest.skip("MatMulBnb4 has no block of one column")
    if method == "awq" and kind not in ("function",):  # nothing there could take a scale
        with pytest.raises(InputError, match="awq can scale none of the graph's"):
            quantize(tmp_path, proto, method)
        return
    result, said = quantize(tmp_path, proto, method)
    assert len(result.layers) == count and not result.kept
    assert signal_to_noise(tmp_path, proto) > (12 if method == "nf4" else 35)
    written = onnx.load(str(tmp_path / "out/model/m.onnx"))
    onnx.checker.check_model(written)
    if method == "gptq" and "th" in GRAPHS[kind][2]:
        assert [text for text in said if "without data" in text and "in a body" in text]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", GRAPHS)
def test_the_same_in_qdq(kind, method, tmp_path):
    proto = proto_of(kind)
    result, _ = quantize(tmp_path, proto, method, encoding="qdq")
    assert len(result.layers) == GRAPHS[kind][3] and signal_to_noise(tmp_path, proto) > 35


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
@pytest.mark.parametrize("kind", STACKS)
def test_stacks_of_matrices(kind, method, tmp_path):
    text, shape = STACKS[kind]
    proto = text_proto(text, {"w": weight(*shape), "ax": np.array([0])}, opset=21, ir_version=10)
    result, _ = quantize(tmp_path, proto, method, encoding="qdq")
    assert [layer.name for layer in result.layers] == ["w"] and signal_to_noise(tmp_path, proto) > 35


def test_stacks_stay_float_where_no_operator_holds_them(tmp_path):
    text = "(float[4,64] x) => (float[] y) { [m] y = MatMul(x, w) [m2] z = MatMul(x, v) }"
    proto = text_proto(text, {"w": weight(2, 64, 48), "v": weight(64, 48)}, opset=21, ir_version=10)
    result, _ = quantize(tmp_path, proto, "rtn")
    assert result.kept == {"w": "it has 3 axes, which MatMulNBits has not: --encoding qdq quantizes it"}


def test_nodes_of_bodies_are_chosen_by_name(tmp_path):
    proto = proto_of("if with weights of its own")
    result, _ = quantize(tmp_path, proto, "rtn", nodes_exclude=("^mt$",))
    assert [layer.name for layer in result.layers] == ["el.w"] and result.kept == {"w": "excluded"}
    assert signal_to_noise(tmp_path, proto) > 35


OLD = {
    1: "(float[4,64] x) => (float[4,48] y) { k = MatMul(x, w) y = Relu(k) }",
    5: "(float[4,64] x) => (float[4,48] y) { k = MatMul(x, w) y = Add<axis: int = 1, broadcast: int = 1>(k, b) }",
    6: "(float[4,64] x) => (float[4,48] y) { k = Gemm<broadcast: int = 1>(x, w, b) y = Relu(k) }",
}


@pytest.mark.parametrize("method", ["rtn", "gptq", "qdq", "dynamic"])
@pytest.mark.parametrize("opset", OLD)
def test_oldest_opsets_are_brought_along(opset, method, tmp_path):
    stored = {"w": weight(64, 48), "b": weight(1, 48)[0]}
    stored = {k: v for k, v in stored.items() if f", {k}" in OLD[opset]}
    proto = text_proto(OLD[opset], stored, opset=opset, ir_version=3)
    for name, array in stored.items():  # they had to be inputs too
        proto.graph.input.append(onnx.parser.parse_graph(f"g (float{[*array.shape]} {name}) => () {{}}").input[0])
    how = {"encoding": "qdq"} if method == "qdq" else {}
    if method == "dynamic":
        result, _ = quantize(tmp_path, proto, method)
        assert len(result.quantized) == 1
    else:
        result, said = quantize(tmp_path, proto, "rtn" if method == "qdq" else method, **how)
        assert [layer.name for layer in result.layers] == ["w"]
        assert [text for text in said if f"converted from opset {opset} to" in text]
    assert result.conversion["before"] == opset
    newest = onnx.version_converter.convert_version(proto, 13) if opset < 7 else proto
    assert signal_to_noise(tmp_path, newest) > 25


def test_an_operator_that_cannot_be_brought_along_is_named(tmp_path):
    text = "(float[4,64] x) => (float[4,48] y) { k = MatMul(x, w) l = Upsample<scales = [1.0, 1.0]>(k) y = Crop(l) }"
    with pytest.raises(InputError, match=r"opset 6 cannot be converted to 13: .*(Upsample|Crop)"):
        quantize(tmp_path, text_proto(text, {"w": weight(64, 48)}, opset=6), "rtn")


def test_what_is_there_is_named_where_nothing_is_quantized(tmp_path):
    text = "(float[4,64] x) => (float[4,64] y) { k = Relu(x) l = Relu(k) y = Add(l, k) }"
    with pytest.raises(InputError, match="it has 2 Relu, 1 Add; MatMul, Gemm with constant weights are taken"):
        quantize(tmp_path, text_proto(text, {}), "rtn")


def test_not_smaller(tmp_path):
    proto = text_proto("(float[4,64] x) => (float[4,1] y) { [m] y = MatMul(x, w) }", {"w": weight(64, 1)}, opset=21)
    result, said = quantize(tmp_path, proto, "rtn")
    assert result.size_bytes > result.parent_size_bytes
    assert [text for text in said if text.startswith("the result is not smaller: it takes")]
    with pytest.raises(InputError, match="the result is not smaller"):
        quantize(tmp_path / "again", proto, "rtn", smaller_only=True)


TIED = {
    "float32": "m = Identity(t) k = Gather(m, ids)",
    "float16, cast before": "m = Cast<to: int = 1>(t) k = Gather(m, ids)",
    "float16, cast behind": "m = Cast<to: int = 1>(t) h = Gather(t, ids) k = Cast<to: int = 1>(h)",
}


@pytest.mark.parametrize("kind", TIED)
def test_a_table_that_is_the_head_too(kind, tmp_path):
    """A tied embedding: quantized where both its readers are, float and said where one stays."""
    nodes = f"{TIED[kind]} w = Transpose<perm = [1,0]>(m) z = Add(x, k) [head] y = MatMul(z, w)"
    table = weight(96, 64).astype(np.float16 if "16" in kind else np.float32)
    stored = {"t": table, "ids": np.array([0, 3, 95, 3])}
    proto = text_proto(f"(float[4,64] x) => (float[4,96] y) {{ {nodes} }}", stored, opset=21, ir_version=10)
    result, _ = quantize(tmp_path / "both", proto, "rtn", op_types=("MatMul", "Gather"))
    assert len(result.layers) == (2 if "behind" in kind else 1) and not result.kept
    assert signal_to_noise(tmp_path / "both", proto) > 35
    with pytest.raises(InputError, match="Gather is not among the operators to quantize"):
        quantize(tmp_path / "one", proto, "rtn")
