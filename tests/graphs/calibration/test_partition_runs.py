"""Graphs in parts: every stage's tensors are those of the whole graph, whatever was changed before it."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import tiny
from onnx_graphs import N, graph_model
from quantcli.errors import InputError
from quantcli.graphs.calibration.moment_stages import levels_of
from quantcli.graphs.calibration.partition_runs import Stream
from quantcli.graphs.walk.matrices import Selection, find_targets, other_matrix, prepare
from quantcli.graphs.walk.partition import crossing_bytes, parts_of

WIDTH, HEADS = 16, 2


def transformer(depth, weights=None):
    """Blocks of attention and a gated MLP: residuals, a shape that all of them read, weights behind Transposes."""
    random = np.random.default_rng(0)
    made, x = {"heads": np.array([HEADS, WIDTH // HEADS]), "axes": np.array([0, 1])}, "x"
    nodes = [N("Shape", "x", "shape", "shape"), N("Gather", "shape axes", "rows", "rows")]
    nodes += [N("Concat", "rows heads", "split", "split", {"axis": 0}), N("Shape", "x", "joined", "joined")]
    for b in range(depth):
        for name in "qkvogud":
            made[f"{name}{b}"] = (random.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
        made |= {f"n{b}": np.ones(WIDTH, np.float32), f"m{b}": np.full(WIDTH, 1.5, np.float32)}
        nodes.append(N("LayerNormalization", f"{x} n{b}", f"in{b}", f"norm{b}"))
        for name, perm in zip("qkv", ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True):
            nodes += [
                N("MatMul", f"in{b} {name}{b}", f"{name}a{b}", f"{name}{b}"),
                N("Reshape", f"{name}a{b} split", f"{name}b{b}", f"split_{name}{b}"),
                N("Transpose", f"{name}b{b}", f"{name}c{b}", f"turn_{name}{b}", {"perm": perm}),
            ]
        nodes += [
            N("MatMul", f"qc{b} kc{b}", f"scores{b}", f"scores{b}"),
            N("Softmax", f"scores{b}", f"probable{b}", f"softmax{b}"),
            N("MatMul", f"probable{b} vc{b}", f"mixed{b}", f"mixed{b}"),
            N("Transpose", f"mixed{b}", f"back{b}", f"back{b}", {"perm": [0, 2, 1, 3]}),
            N("Reshape", f"back{b} joined", f"attended{b}", f"join{b}"),
            N("Transpose", f"o{b}", f"ot{b}", f"turned{b}", {"perm": [1, 0]}),
            N("MatMul", f"attended{b} ot{b}", f"out{b}", f"o{b}"),
            N("Add", f"{x} out{b}", f"mid{b}", f"add{b}"),
            N("LayerNormalization", f"mid{b} m{b}", f"normed{b}", f"norm_mlp{b}"),
            N("MatMul", f"normed{b} g{b}", f"gate{b}", f"g{b}"),
            N("MatMul", f"normed{b} u{b}", f"up{b}", f"u{b}"),
            N("Sigmoid", f"gate{b}", f"open{b}", f"sigmoid{b}"),
            N("Mul", f"open{b} up{b}", f"gated{b}", f"mul{b}"),
            N("MatMul", f"gated{b} d{b}", f"down{b}", f"d{b}"),
            N("Add", f"mid{b} down{b}", f"x{b + 1}", f"add_mlp{b}"),
        ]
        x = f"x{b + 1}"
    made["c"] = made["g0"][:, :5].copy()
    nodes.append(N("MatMul", f"{x} c", "y", "head"))
    model = graph_model(nodes, made, ranks={"x": 3, "y": 3})
    random = np.random.default_rng(1)
    return model, [{"x": random.standard_normal((n, 3 + n, WIDTH)).astype(np.float32)} for n in (2, 1, 3)]


def cnn():
    """Convolutions with a residual, and a Gemm behind another."""
    random = np.random.default_rng(0)
    shapes = {"k": (6, 3, 3, 3), "l": (6, 6, 3, 3), "a": (6, 8), "b": (8, 8), "c": (8, 4)}
    nodes = [
        N("Conv", "x k", "h", "conv", {"pads": [1, 1, 1, 1]}),
        N("Conv", "h l", "i", "conv2", {"pads": [1, 1, 1, 1]}),
        N("Add", "h i", "s", "skip"),
        N("Relu", "s", "r", "relu"),
        N("GlobalAveragePool", "r", "p", "pool"),
        N("Flatten", "p", "f", "flat"),
        N("Gemm", "f a", "g", "first"),
        N("Relu", "g", "t", "relu2"),
        N("Gemm", "t b", "v", "second"),
        N("Add", "v g", "w", "skip2"),
        N("Gemm", "w c", "y", "third"),
    ]
    weights = {n: (random.standard_normal(s) / s[-1]).astype(np.float32) for n, s in shapes.items()}
    feeds = [{"x": random.standard_normal((n, 3, 7, 5)).astype(np.float32)} for n in (4, 2)]
    return graph_model(nodes, weights, ranks={"x": 4}), feeds


def branches():
    """An If whose branches read tensors of the graph outside, one of them made by a product."""
    random = np.random.default_rng(0)
    weights = {n: random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 4 for n in "abc"} | {
        "half": np.float32(0)
    }
    nodes = [
        N("MatMul", "x a", "h1", "first"),
        N("ReduceSum", "x", "total", "total", {"keepdims": 0}),
        N("Greater", "total half", "yes", "greater"),
        N("MatMul", "h1 b", "h2", "second"),
        N("Identity", "h2", "h3", "identity"),
        N("MatMul", "h3 c", "y", "third"),
    ]
    model = graph_model(nodes, weights)
    made = {str(v.name): v for node in model.graph for v in node.outputs}
    bodies = []
    for op in ("Neg", "Abs"):
        body = ir.node(op, [made["h1"]])
        body.outputs[0].name = f"{op}_of_h1"
        bodies.append(ir.Graph([], body.outputs, nodes=[body], name=op))
    identity = next(n for n in model.graph if n.op_type == "Identity")
    branch = ir.node("If", [made["yes"]], {"then_branch": bodies[0], "else_branch": bodies[1]}, name="if")
    added = ir.node("Add", [branch.outputs[0], made["h2"]], name="add")
    branch.outputs[0].name, added.outputs[0].name = "chosen", "added"
    model.graph.insert_before(identity, [branch, added])
    identity.replace_input_with(0, added.outputs[0])
    return model, [{"x": sign * np.abs(random.standard_normal((5, WIDTH))).astype(np.float32)} for sign in (1, -1)]


def shared():
    """A matrix that two steps read."""
    random = np.random.default_rng(0)
    weights = {n: random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 4 for n in "abc"}
    reads = ["x a", "h1 b", "h2 c", "h3 b", "h4 a"]
    nodes = [N("MatMul", read, f"h{i + 1}", f"n{i}") for i, read in enumerate(reads)]
    model = graph_model(nodes, weights, outputs="h5")
    return model, [{"x": random.standard_normal((5, WIDTH)).astype(np.float32)} for _ in range(2)]


MODELS = {"transformer": lambda: transformer(2), "cnn": cnn, "branches": branches, "shared": shared}


def prepared(made):
    model, feeds = made
    prepare(model)
    targets, _ = find_targets(model.graph, Selection())
    return model, feeds, targets, levels_of(model.graph, targets)


def coarse(model, target):
    """Another weight, far from the first."""
    values = torch.from_numpy(np.array(model.graph.initializers[target.name].const_value.numpy()))
    values = values.T if target.transposed else values
    return other_matrix(model.graph, target, lambda: ((values * 2).round() / 2).numpy())


def literal(model, weights, names, feeds):
    """The tensors of the whole graph with those weights, run once from its beginning."""
    whole = model.clone()
    for name, tensor in weights.items():
        whole.graph.initializers[name].const_value = ir.Tensor(tensor.numpy(), name=name)
    values = {v.name: v for v in (*whole.graph.inputs, *(v for node in whole.graph for v in node.outputs))}
    computed = [n for n in names if values[n].producer() is not None]
    whole.graph.outputs[:] = [values[n] for n in computed]
    if not computed:
        return [{n: feed[n] for n in names} for feed in feeds]
    session = onnxruntime.InferenceSession(ir.to_proto(whole).SerializeToString(), providers=["CPUExecutionProvider"])
    return [dict(feed) | dict(zip(computed, session.run(computed, feed), strict=True)) for feed in feeds]


def compare(found, wanted, names):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert list(one) == list(names)
        for name in names:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("room", [1 << 62, 100, 0])
@pytest.mark.parametrize("name", MODELS)
def test_a_stage_sees_every_change_before_it(name, room, tmp_path):
    """And a fork that changes nothing goes on as the float graph; with little room both keep files."""
    model, feeds, targets, levels = prepared(MODELS[name]())
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    stream = Stream(model, tmp_path, feeds, levels, room_bytes=room, spill=folders[0])
    changed, seen, spilled = {}, set(), 0
    for number, names in enumerate(levels):
        compare(list(stream.run(number)), literal(model, changed, names, feeds), names)
        if not number:
            fork = stream.fork(folders[1])
        else:
            compare(list(fork.run(number)), literal(model, {}, names, feeds), names)
        spilled += len([*folders[0].iterdir(), *folders[1].iterdir()])
        seen |= set(names)
        for target in targets:
            if target.name not in changed and set(target.inputs) <= seen:
                changed[target.name] = coarse(model, target)
                stream.change(target, changed[target.name])
    assert (spilled > 0) == (room < 1 << 62)
    assert not [*folders[0].iterdir(), *folders[1].iterdir()]
    assert len(changed) == len(targets)


def test_the_work_grows_linearly_with_the_depth():
    """Each node that a tensor needs is in one part, and runs once per batch."""
    runs = {}
    for depth in (2, 4, 8):
        model, feeds, _, levels = prepared(transformer(depth))
        assert len(levels) == 4 * depth + 1
        stream = Stream(model, "", feeds, levels)
        for number in range(len(levels)):
            for _ in stream.run(number):
                pass
        runs[depth] = stream.node_runs
        constant = {n for n in model.graph if n.name.startswith("turned")}
        nodes = [n for part in parts_of(model.graph, levels) for n in part.nodes if n not in constant]
        assert len(set(nodes)) == len(nodes) == len(model.graph) - 1 - len(constant)  # without the head
        assert stream.node_runs <= len(feeds) * len(model.graph)
    assert runs[8] - runs[4] == 2 * (runs[4] - runs[2])


def test_no_weight_is_kept_and_little_else():
    """Between two steps of a block: what the step gives, and the residual."""
    model, _, _, levels = prepared(transformer(3))
    parts = parts_of(model.graph, levels)
    for part in parts:
        assert not any(v.name.startswith(("ot", "shape")) for v in part.keeps)
        assert len(part.keeps) <= 4  # two shapes, a tensor of the block, its residual
    assert parts[-1].keeps == ()
    for node in model.graph:
        for value in node.outputs:
            value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(["rows", "tokens", WIDTH])
    assert crossing_bytes(parts, 10) == 4 * 10 * WIDTH * max(sum(v.name != "x" for v in p.keeps) for p in parts)


def test_a_shared_matrix_begins_the_graph_anew():
    model, feeds, targets, levels = prepared(shared())
    stream = Stream(model, "", feeds, levels)
    late = {}
    seen = set()
    for number, names in enumerate(levels):
        assert len(list(stream.run(number))) == len(feeds)
        seen |= set(names)
        for target in targets:
            if target.name not in late and set(target.inputs) <= seen:
                late[target.name] = stream.change(target, coarse(model, target))
    assert late == {"c": False, "b": True, "a": True}
    assert stream.node_runs == len(feeds) * (3 + 4)  # the fourth product behind the new beginning


@pytest.mark.parametrize(
    ("make", "read", "named"),
    [
        (N("SequenceConstruct", "x x", "s", "s"), ("SequenceAt", "s zero", {}), "'s'"),
        (N("Cast", "x", "s", "s", {"to": 16}), ("Cast", "s", {"to": 1}), "a value of a type that numpy does not have"),
    ],
    ids=["sequence", "bfloat16"],
)
def test_what_cannot_be_kept_is_said(make, read, named):
    """And the graph is run from its beginning at each step."""
    random = np.random.default_rng(0)
    weights = {n: random.standard_normal((WIDTH, WIDTH)).astype(np.float32) for n in "ab"} | {"zero": np.array(0)}
    op, names, attributes = read
    nodes = [
        make,
        N(op, names, "t", "read", attributes),
        N("MatMul", "t a", "h", "first"),
        N(op, names, "t2", "again", attributes),
        N("Add", "h t2", "u", "add"),
        N("MatMul", "u b", "y", "second"),
    ]
    feeds = [{"x": random.standard_normal((3, WIDTH)).astype(np.float32)} for _ in range(2)]
    model, feeds, targets, levels = prepared((graph_model(nodes, weights), feeds))
    assert levels == [["t"], ["u"]]
    progress = tiny.Warnings()
    stream = Stream(model, "", feeds, levels, progress=progress)
    compare(list(stream.run(0)), literal(model, {}, ["t"], feeds), ["t"])
    fork = stream.fork()
    changed = {"a": coarse(model, targets[0])}
    stream.change(targets[0], changed["a"])
    compare(list(stream.run(1)), literal(model, changed, ["u"], feeds), ["u"])
    compare(list(fork.run(1)), literal(model, {}, ["u"], feeds), ["u"])
    (said,) = progress.said
    assert said.startswith(f"{named} crosses the steps of calibration") and said.endswith("beginning at each step")


def test_a_tensor_that_nothing_computes():
    model, feeds = transformer(1)
    with pytest.raises(InputError, match="computes no tensor 'nothing'"):
        Stream(model, "", feeds, [["nothing"]])
