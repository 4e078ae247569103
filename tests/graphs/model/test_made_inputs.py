"""Inputs made up for graphs: the graph runs on them, whatever it asks of them."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests.text_graphs import text_proto

from quantcli.errors import InputError
from quantcli.graphs.model.made_inputs import made_up_inputs, run_samples, sample_inputs

RANDOM = np.random.default_rng(0)


def floats(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def model(text, weights=None, **kwargs):
    return ir.from_proto(text_proto(text, weights or {}, **kwargs))


LOOKUPS = {
    "plain": "i = Identity(ids)",
    "cast": "i = Cast<to: int = 7>(ids)",
    "cast of floats": "f = Cast<to: int = 1>(ids) i = Cast<to: int = 7>(f)",
    "reshape": "f = Reshape(ids, flat) i = Unsqueeze(f, one)",
    "add": "i = Add(ids, two)",
    "sub": "i = Sub(ids, two)",
    "mul": "i = Mul(ids, two)",
    "mul and add": "f = Mul(ids, two) i = Add(two, f)",
    "add of two": "i = Add(ids, ids)",
}


@pytest.mark.parametrize("kind", LOOKUPS)
def test_indexes_stay_inside_their_table(kind):
    """The very first guess is right: numbers are read from the graph, not tried out."""
    stored = {"table": floats(5, 4), "two": np.array([2]), "flat": np.array([-1]), "one": np.array([1])}
    text = f"(int64[n,t] ids) => (float[] y) {{ {LOOKUPS[kind]} y = Gather(table, i) }}"
    made = model(text, stored)
    guesses = [next(made_up_inputs(made, {}, seed))["ids"] for seed in range(4)]
    feeds = [feed["ids"] for feed in sample_inputs(made, ".", {}, 4)]
    assert all(np.array_equal(one, other) for one, other in zip(guesses, feeds, strict=True))
    if kind == "plain":
        assert {int(n) for ids in feeds for n in ids.flat} == set(range(5))


BODIES = {
    "if": """(bool c, int64[t] ids) => (float[] y) {
        y = If<then_branch = a () => (float[] u) { u = Gather(table, ids) },
               else_branch = b () => (float[] v) { v = Gather(large, ids) }>(c) }""",
    "loop": """(int64 steps, int64[t] ids) => (int64[] last, float[] y) {
        last, y = Loop<body = a (int64 i, bool go, int64[] carried) => (bool on, int64[] again, float[] row) {
            on = Identity(go) again = Identity(carried) row = Gather(table, carried) }>(steps, , ids) }""",
    "scan": """(int64[1,t] ids) => (float[] y) {
        y = Scan<num_scan_inputs: int = 1, body = a (int64[] one) => (float[] row) {
            row = Gather(table, one) }>(ids) }""",
    "function": """(int64[t] ids) => (float[] y) { y = own.Look(table, ids) }
        <domain: "own", opset_import: ["" : 18]> Look (t, i) => (o) { o = Gather(t, i) }""",
}


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_and_functions_are_looked_into(kind):
    stored = {"table": floats(3, 4), "large": floats(900, 4)}
    made = model(BODIES[kind], stored if kind == "if" else {"table": stored["table"]})
    feeds = [feed for feed, _ in run_samples(made, ".", {}, 6)]
    assert {int(n) for feed in feeds for n in feed["ids"].flat} == {0, 1, 2}
    if kind == "if":
        assert {bool(feed["c"]) for feed in feeds} == {True, False}  # both branches run


ASKED = {
    "matmul": "float[n,t,k] x | y = MatMul(x, w)",
    "matmul behind relu": "float[n,t,k] x | r = Relu(x) y = MatMul(r, w)",
    "transposed": "float[n,k,t] x | r = Transpose<perm = [0,2,1]>(x) y = MatMul(r, w)",
    "gemm of unknown rank": "float[] x | y = Gemm(x, w)",
    "gemm across": "float[k,n] x | y = Gemm<transA: int = 1, transB: int = 1>(x, w2)",
    "conv of unknown rank": "float[] x | y = Conv(x, kernel)",
    "conv": "float[n,c,h,w] x | y = Conv(x, kernel)",
    "bias": "float[n,k] x | y = Add(x, bias)",
    "two names": "float[a,k] x, float[b,k] x2 | y = Concat<axis: int = 0>(x, x2)",
    "product of two": "float[a,b] x, float[c,d] x2 | y = MatMul(x, x2)",
    "lstm": "float[t,b,k] x, float[?,b,h] state | h0, y, c0 = LSTM<hidden_size: int = 8>(x, W, R, , , state)",
}


@pytest.mark.parametrize("kind", ASKED)
def test_lengths_are_those_that_weights_ask_for(kind):
    inputs, _, nodes = ASKED[kind].partition("|")
    weights = {"w": (6, 4), "w2": (4, 6), "kernel": (2, 23, 3, 3), "bias": (17,), "W": (1, 32, 9), "R": (1, 32, 8)}
    weights = {name: floats(*shape) for name, shape in weights.items() if f", {name}" in nodes}
    made = model(f"({inputs}) => (float[] y) {{ {nodes} }}", weights)
    ((_, (found,)),) = run_samples(made, ".", {}, 1)
    assert np.isfinite(found).all() and found.size


def test_one_name_has_one_length_wherever_it_stands():
    made = model("(float[batch,t] x, float[t] offset) => (float[] y) { y = Add(x, offset) }")
    for feed in made_up_inputs(made, {}):
        assert feed["x"].shape[1] == feed["offset"].shape[0]
    (feed,) = sample_inputs(made, ".", {"t": 5}, 1)
    assert feed["x"].shape == (1, 5)


def test_sums_of_lengths_are_understood():
    made = model(
        "(float[b,p] past, float[b,t] x, float[b,s] attention_mask) => (float[] y) "
        "{ a = Concat<axis: int = 1>(past, x) y = Mul(a, attention_mask) }"
    )
    made.graph.inputs[2].shape = ir.Shape(["b", "p + t"])
    feed = next(made_up_inputs(made, {}))
    assert feed["attention_mask"].shape[1] == feed["past"].shape[1] + feed["x"].shape[1]
    assert (feed["attention_mask"] == 1).all()


@pytest.mark.parametrize("kind", ["float16", "double", "int8", "uint8", "int16", "int32", "uint64", "bool"])
@pytest.mark.parametrize("shape", ["", "[0,3]", "[n]", "[2,?,n]"])
def test_every_type_and_fixed_shape(kind, shape):
    made = model(f"({kind}{shape} x) => ({kind}[] y) {{ y = Identity(x) }}")
    for feed, (found,) in run_samples(made, ".", {}, 2):
        assert feed["x"].dtype == made.graph.inputs[0].dtype.numpy()
        assert np.array_equal(feed["x"], found)
        wanted = shape.strip("[]").split(",") if shape else []
        assert len(wanted) == found.ndim
        assert all(int(n) == size for n, size in zip(wanted, found.shape, strict=True) if n.isdigit())


def test_sequences_and_optionals():
    made = model(
        "(seq(float[2,n]) s, optional(float[n]) o) => (float[] y, float[] z) "
        "{ y = ConcatFromSequence<axis: int = 0>(s) z = OptionalGetElement(o) }"
    )
    ((_, (joined, value)),) = run_samples(made, ".", {}, 1)
    assert joined.shape[0] == 4 and value.ndim == 1


def test_numbers_that_a_graph_compares_with():
    """A sampling rate decides on the branch; no other number is right."""
    made = model(
        """(float[n] x, int64 rate) => (float[] y) {
        is_high = Equal(rate, high)
        y = If<then_branch = a () => (float[] u) { u = Identity(x) }, else_branch = b () => (float[] v) {
            is_low = Equal(rate, low)
            v = If<then_branch = c () => (float[] s) { s = Identity(x) },
                   else_branch = d () => (float[] t) { t = Reshape(x, never) }>(is_low) }>(is_high) }""",
        {"high": np.int64(16000), "low": np.int64(8000), "never": np.array([7, 7, 7, 7])},
    )
    assert {int(f["rate"]) for f in sample_inputs(made, ".", {}, 4)} == {8000, 16000}


def test_finite_outputs_come_first():
    made = model("(float[n,3] x) => (float[] y) { y = Log(x) }")
    for _, (found,) in run_samples(made, ".", {}, 3):
        assert np.isfinite(found).all()


def test_samples_differ():
    made = model("(float[n,3] x) => (float[] y) { y = Relu(x) }")
    one, two = sample_inputs(made, ".", {}, 2)
    assert not np.array_equal(one["x"], two["x"])


def test_what_cannot_be_made_up_is_said():
    for text, why in (
        ("(string[n] x) => (string[] y) { y = Identity(x) }", "'x' takes text"),
        ("(float[] x) => (float[] y) { y = Relu(x) }", "'x' are not known"),
        ("(float[3] x) => (float[] y) { y = Reshape(x, s) }", "no inputs could be made up for it: "),
    ):
        made = model(text, {"s": np.array([7, 11])} if "Reshape" in text else {})
        with pytest.raises(InputError, match=why):
            sample_inputs(made, ".", {}, 1)


def test_defaults_are_left_alone():
    proto = text_proto("(float[2] x, float[2] w) => (float[] y) { y = Add(x, w) }", {"w": floats(2)})
    (feed,) = sample_inputs(ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString())), ".", {}, 1)
    assert set(feed) == {"x"}
