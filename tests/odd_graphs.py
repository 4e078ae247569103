"""Small graphs with the traits that trip quantizers: each is a name, a graph, and samples for it."""

import itertools

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

F, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
KINDS = {}
"""Builders by name: each gives a model and a function from a seed to a sample."""


def kind(function):
    KINDS[function.__name__] = function
    return function


def info(name, shape, dtype=F):
    value = onnx.ValueInfoProto(name=name)
    value.type.tensor_type.elem_type = dtype
    if shape is not None:
        value.type.tensor_type.shape.SetInParent()
        for size in shape:
            dim = value.type.tensor_type.shape.dim.add()
            setattr(dim, "dim_param" if isinstance(size, str) else "dim_value", size)
    return value


def floats(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def weight(seed, *shape):
    return floats(seed, *shape, scale=1 / np.sqrt(shape[-2] if len(shape) > 1 else 1))


def graph(name, nodes, inputs, outputs, constants):
    weights = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    return onnx.GraphProto(name=name, node=nodes, input=inputs, output=outputs, initializer=weights)


def model(nodes, inputs, outputs, constants, functions=(), opset=17):
    made = graph("g", nodes, inputs, outputs, constants)
    imports = [opset_id("", opset), *(opset_id(f.domain, 1) for f in functions)]
    return onnx.ModelProto(ir_version=9, opset_import=imports, graph=made, functions=list(functions))


def opset_id(domain, version):
    return onnx.OperatorSetIdProto(domain=domain, version=version)


def node(op_type, inputs, output, name=None, domain="", **attributes):
    outputs = [output] if isinstance(output, str) else output
    made = onnx.NodeProto(op_type=op_type, input=inputs.split(",") if inputs else [], output=outputs, domain=domain)
    made.name = name or f"n_{outputs[0]}"
    for key, value in attributes.items():
        made.attribute.append(_attribute(key, value))
    return made


def _attribute(name, value):
    kinds = {int: ("INT", "i"), float: ("FLOAT", "f"), str: ("STRING", "s"), onnx.GraphProto: ("GRAPH", "g")}
    made = onnx.AttributeProto(name=name)
    if isinstance(value, list):
        made.type = onnx.AttributeProto.INTS
        made.ints.extend(value)
        return made
    kind, place = kinds[type(value)]
    made.type = onnx.AttributeProto.AttributeType.Value(kind)
    if kind == "GRAPH":
        made.g.CopyFrom(value)
    else:
        setattr(made, place, value.encode() if kind == "STRING" else value)
    return made


def rows(seed, count=4, width=64):
    return {"x": floats(seed, count, width)}


def image(seed, channels=8, size=12):
    return {"x": floats(seed, 1, channels, size, size)}


def one_input(nodes, constants, output=("n", 48), **more):
    return model(nodes, [info("x", [4, 64])], [info("y", list(output) if output else None)], constants, **more), rows


def on_images(nodes, constants, **more):
    return model(nodes, [info("x", [1, 8, 12, 12])], [info("y", None)], constants, **more), image


def kernel(seed, *shape):
    return floats(seed, *shape, scale=1 / np.sqrt(np.prod(shape[1:])))


def _batched(*shape):
    def build():
        made = model([node("MatMul", "x,w", "y")], [info("x", None)], [info("y", None)], {"w": weight(0, *shape)})
        made.graph.input[0].CopyFrom(info("x", [*shape[:-2], 5, shape[-2]]))
        return made, lambda seed: {"x": floats(seed, *shape[:-2], 5, shape[-2])}

    return build


for _shape in ((4, 64, 48), (2, 3, 32, 16), (1, 64, 48), (3, 32, 1)):
    KINDS[f"batch_of_weights_{'x'.join(map(str, _shape))}"] = _batched(*_shape)


@kind
def batch_of_weights_on_a_matrix():
    return one_input([node("MatMul", "x,w", "y")], {"w": weight(0, 3, 64, 48)}, None)


def _gemm(alpha, beta, turn_a, turn_b, bias):
    def build():
        shape = (48, 64) if turn_b else (64, 48)
        constants = {"w": weight(1, *shape) * np.float32(1.0 if not turn_b else 0.9)}
        inputs = "x,w"
        if bias is not None:
            constants["b"], inputs = floats(2, *bias), "x,w,b"
        attributes = {"alpha": alpha, "beta": beta, "transA": turn_a, "transB": turn_b}
        nodes = [
            node("Gemm", inputs, "h", "g1", **attributes),
            node("Relu", "h", "r"),
            node("MatMul", "r,v", "y", "last"),
        ]
        constants["v"] = weight(3, 48, 16)
        made = model(nodes, [info("x", [64, 4] if turn_a else [4, 64])], [info("y", [4, 16])], constants)
        return made, lambda seed: {"x": floats(seed, 64, 4) if turn_a else floats(seed, 4, 64)}

    return build


_BIASES = (None, (48,), (1,), (), (4, 1), (4, 48), (1, 48), (1, 1))
for _i, (_a, _b) in enumerate(itertools.product((0, 1), (0, 1))):
    KINDS[f"gemm_{_a}{_b}"] = _gemm(0.5, 2.0, _a, _b, (48,))
    KINDS[f"gemm_odd_bias_{_a}{_b}"] = _gemm(1.0, 1.0, _a, _b, _BIASES[_i * 2 + 1])
for _i, _bias in enumerate(_BIASES):
    KINDS[f"gemm_bias_{_i}"] = _gemm(1.0 if _i % 2 else 1.5, 1.0 if _i % 3 else 0.25, 0, _i % 2, _bias)
KINDS["gemm_beta_0"] = _gemm(1.0, 0.0, 0, 0, (48,))


@kind
def gemm_of_computed_values():
    nodes = [
        node("MatMul", "x,w", "h"),
        node("MatMul", "x,v", "k"),
        node("Gemm", "h,k,b", "y", "g", alpha=0.25, beta=3.0, transB=1),
    ]
    return one_input(nodes, {"w": weight(0, 64, 32), "v": weight(1, 64, 32), "b": floats(2, 4)}, (4, 4))


@kind
def gemm_of_a_computed_bias():
    nodes = [node("MatMul", "x,v", "k"), node("Gemm", "x,w,k", "y", "g", alpha=0.5, beta=0.5)]
    return one_input(nodes, {"w": weight(0, 64, 48), "v": weight(1, 64, 48)})


@kind
def gemms_that_share_weight_and_bias():
    nodes = [
        node("Gemm", "x,w,b", "h", "g1"),
        node("Mul", "h,big", "h2"),
        node("Gemm", "h2,w,b", "k", "g2", transB=1),
        node("MatMul", "k,w", "y"),
    ]
    return one_input(nodes, {"w": weight(0, 64, 64), "b": floats(1, 64), "big": np.float32(50)}, (4, 64))


KINDS["weight_of_gather_and_matmul"] = lambda: one_input(
    [node("Gather", "w,at", "e"), node("Add", "e,x", "a"), node("MatMul", "a,w", "y")],
    {"w": weight(0, 64, 64), "at": np.array([3, 9, 27, 60])},
    (4, 64),
)


@kind
def conv_with_two_readers():
    nodes = [
        node("Conv", "x,w,b", "a", pads=[1] * 4),
        node("Relu", "a", "p"),
        node("Conv", "p,v", "q", pads=[1] * 4),
        node("Add", "q,a", "y"),
    ]
    return on_images(nodes, {"w": kernel(0, 8, 8, 3, 3), "b": floats(1, 8), "v": kernel(2, 8, 8, 3, 3)})


@kind
def relu_beside_an_output():
    nodes = [node("Conv", "x,w", "y"), node("Relu", "y", "r"), node("Conv", "r,v", "z")]
    made, feed = on_images(nodes, {"w": kernel(0, 8, 8, 3, 3), "v": kernel(2, 8, 8, 3, 3)})
    made.graph.output.append(info("z", None))
    return made, feed


@kind
def swish():
    nodes = [node("Conv", "x,w", "a"), node("Sigmoid", "a", "s"), node("Mul", "a,s", "m"), node("Conv", "m,v", "y")]
    return on_images(nodes, {"w": kernel(0, 8, 8, 3, 3), "v": kernel(2, 8, 8, 3, 3)})


def _clips(*limits):
    def build():
        constants = {"w": kernel(0, 8, 8, 3, 3), "v": kernel(2, 8, 8, 3, 3)}
        nodes, name = [node("Conv", "x,w", "c")], "c"
        for i, (low, high) in enumerate(limits):
            constants |= {f"l{i}": np.float32(low), f"h{i}": np.float32(high)}
            nodes.append(node("Clip", f"{name},l{i},h{i}", f"k{i}"))
            name = f"k{i}"
        return on_images([*nodes, node("Conv", f"{name},v", "y")], constants)

    return build


KINDS["clip_of_relu6"] = _clips((0, 6))
KINDS["clip_above_0"] = _clips((0.5, 1))
KINDS["clip_below_0"] = _clips((-1, -0.5))
KINDS["clips_in_a_row"] = _clips((-2, 2), (0, 1))
KINDS["clip_of_masks"] = _clips((float(np.finfo(np.float32).min), 1e9))
KINDS["clip_without_end"] = _clips((-np.inf, np.inf))


@kind
def clip_without_limits():
    nodes = [node("Conv", "x,w", "c"), node("Clip", "c,,h", "k"), node("Conv", "k,v", "y")]
    return on_images(nodes, {"w": kernel(0, 8, 8, 3, 3), "v": kernel(2, 8, 8, 3, 3), "h": np.float32(0.5)})


@kind
def relu_behind_a_reshape():
    nodes = [
        node("Conv", "x,w", "c"),
        node("Reshape", "c,s", "f"),
        node("Relu", "f", "r"),
        node("MatMul", "r,v", "y"),
    ]
    constants = {"w": kernel(0, 8, 8, 3, 3), "s": np.array([1, 8, 100]), "v": weight(1, 100, 16)}
    return on_images(nodes, constants)


def _small_channels(op_type, factor, bias):
    def build():
        shape = (8, 6, 3, 3) if op_type == "ConvTranspose" else (6, 8, 3, 3)
        w = kernel(0, *shape)
        w[(slice(None), 0) if op_type == "ConvTranspose" else 0] *= np.float32(factor)
        b = floats(1, 6, scale=0.1)
        b[0] = bias
        made, _ = on_images([node(op_type, "x,w,b", "y")], {"w": w, "b": b})
        return made, lambda seed: {"x": image(seed)["x"] * np.float32(0.01)}

    return build


for _op in ("Conv", "ConvTranspose"):
    KINDS[f"bias_beyond_int32_{_op}"] = _small_channels(_op, 1e-7, 20.0)
    KINDS[f"dead_channel_{_op}"] = _small_channels(_op, 0.0, 0.05)
KINDS["bias_far_beyond_int32"] = _small_channels("Conv", 1.0, 1e4)


@kind
def gemm_bias_beyond_int32():
    w = weight(0, 64, 48)
    w[:, 3] *= np.float32(1e-9)
    b = floats(1, 48)
    b[3] = 30
    return one_input([node("Gemm", "x,w,b", "y")], {"w": w, "b": b})


@kind
def conv_of_dead_weights():
    return on_images([node("Conv", "x,w,b", "y")], {"w": np.zeros((8, 8, 3, 3), np.float32), "b": floats(1, 8)})


@kind
def grouped_conv_transpose():
    return on_images([node("ConvTranspose", "x,w,b", "y", group=2)], {"w": kernel(0, 8, 4, 3, 3), "b": floats(1, 8)})


@kind
def one_column():
    nodes = [node("Gemm", "x,w,b", "h"), node("MatMul", "h,v", "y")]
    return one_input(nodes, {"w": weight(0, 64, 1), "b": floats(1, 1), "v": floats(2, 1, 8)}, (4, 8))


@kind
def vector():
    return one_input([node("MatMul", "x,u", "h"), node("MatMul", "x,w", "k"), node("MatMul", "h,k", "y")],
                     {"u": weight(0, 64), "w": weight(1, 64, 48)}, None)  # fmt: skip


@kind
def constant_on_the_left():
    return one_input(
        [node("MatMul", "w,x", "h"), node("MatMul", "h,v", "y")], {"w": weight(0, 32, 4), "v": weight(1, 64, 8)}, None
    )


def _attention(op_type, mask):
    def build():
        constants = {n: weight(i, 64, 32) for i, n in enumerate(("wq", "wk", "wv"))} | {"c": np.float32(32**-0.5)}
        triangle = np.triu(np.ones((8, 8), bool), 1)
        nodes = [node("MatMul", f"x,w{n}", n) for n in "qkv"]
        nodes += [node("Transpose", "k", "t", perm=[0, 2, 1]), node("MatMul", "q,t", "s0"), node("Mul", "s0,c", "s1")]
        if op_type == "Add":
            constants["mask"] = np.where(triangle, np.float32(mask), np.float32(0))
            nodes.append(node("Add", "s1,mask", "s"))
        else:
            constants |= {"allowed": ~triangle, "mask": np.float32(mask)}
            nodes.append(node("Where", "allowed,s1,mask", "s"))
        nodes += [node("Softmax", "s", "p", axis=-1), node("MatMul", "p,v", "y")]
        return model(nodes, [info("x", [2, 8, 64])], [info("y", None)], constants), lambda seed: {
            "x": floats(seed, 2, 8, 64)
        }

    return build


for _op, _mask in itertools.product(("Add", "Where"), (-np.inf, float(np.finfo(np.float32).min), -1e9, -1e4)):
    KINDS[f"mask_{_op}_{_mask:g}"] = _attention(_op, _mask)


@kind
def maximum_with_a_mask():
    nodes = [node("MatMul", "x,w", "a"), node("Max", "a,least", "m"), node("MatMul", "m,v", "y")]
    least = np.full((1, 48), -np.inf, np.float32)
    return one_input(nodes, {"w": weight(0, 64, 48), "v": weight(1, 48, 8), "least": least}, None)


@kind
def pool_over_masks():
    nodes = [
        node("Conv", "x,w", "c"),
        node("Pad", "c,pads,low", "p"),
        node("MaxPool", "p", "m", kernel_shape=[3, 3], strides=[2, 2]),
        node("Conv", "m,v", "y"),
    ]
    constants = {"w": kernel(0, 8, 8, 3, 3), "v": kernel(1, 8, 8, 3, 3)}
    return on_images(nodes, constants | {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "low": np.float32(-np.inf)})


def _scores_and_boxes(tail):
    def build():
        nodes = [
            node("MatMul", "x,w", "h"),
            node("MatMul", "h,wb", "b0"),
            node("Mul", "b0,big", "b"),
            node("MatMul", "h,ws", "s0"),
            node("Sigmoid", "s0", "s"),
            node("Concat", "b,s", "c", axis=1),
            *tail,
        ]
        constants = {"w": weight(0, 64, 64), "wb": weight(1, 64, 8), "ws": weight(2, 64, 8), "big": np.float32(600)}
        constants |= {"sizes": np.array([8, 8]), "shape": np.array([4, 1, 16]), "flat": np.array([4, 16])}
        made = model(nodes, [info("x", [4, 64])], [info("boxes", None), info("scores", None)], constants)
        return made, rows

    return build


KINDS["boxes_beside_scores"] = _scores_and_boxes([node("Split", "c,sizes", ["boxes", "scores"], "n_split", axis=1)])
KINDS["boxes_beside_scores_moved"] = _scores_and_boxes([
    node("Reshape", "c,shape", "c1"),
    node("Transpose", "c1", "c2", perm=[1, 0, 2]),
    node("Reshape", "c2,flat", "c3"),
    node("Split", "c3,sizes", ["boxes", "scores"], "n_split", axis=1),
])  # fmt: skip


@kind
def average_of_many():
    nodes = [node("Conv", "x,w", "c"), node("AveragePool", "c", "a", kernel_shape=[10, 10]), node("Conv", "a,v", "y")]
    return on_images(nodes, {"w": kernel(0, 8, 8, 3, 3), "v": kernel(1, 8, 8, 1, 1)})


@kind
def empty_constants():
    nodes = [node("MatMul", "x,w", "a"), node("Concat", "a,empty", "y", axis=1)]
    return one_input(nodes, {"w": weight(0, 64, 48), "empty": np.zeros((4, 0), np.float32)}, (4, 48))


@kind
def input_as_output():
    made, feed = one_input([node("MatMul", "x,w", "y"), node("Identity", "x", "again")], {"w": weight(0, 64, 48)})
    made.graph.output.append(info("again", [4, 64]))
    return made, feed


@kind
def constants_as_inputs_and_outputs():
    made, feed = one_input(
        [node("MatMul", "x,w", "a"), node("Add", "a,b", "y")], {"w": weight(0, 64, 48), "b": floats(1, 48)}
    )
    made.graph.input.extend([info("w", [64, 48]), info("b", [48])])
    made.graph.output.append(info("b", [48]))
    return made, feed


@kind
def cubic_resize():
    nodes = [node("Conv", "x,w", "a"), node("Resize", "a,,s", "b", mode="cubic"), node("Conv", "b,v", "y")]
    constants = {"w": kernel(0, 8, 8, 3, 3), "v": kernel(1, 8, 8, 3, 3), "s": np.array([1, 1, 2, 2], np.float32)}
    return on_images(nodes, constants)


# --- bodies


def _branch(name, act, constants=None, value="a0", w="w"):
    nodes = [node("MatMul", f"{value},{w}", f"{name}0", "same"), node(act, f"{name}0", f"{name}1", f"{name}act")]
    return graph(name, nodes, [], [info(f"{name}1", None)], constants or {})


def _with_branches(then, other, constants):
    nodes = [
        node("MatMul", "x,w0", "a0", "first"),
        node("ReduceSum", "a0", "sum", keepdims=0),
        node("Greater", "sum,zero", "cond"),
        node("If", "cond", "a", "if", then_branch=then, else_branch=other),
        node("Add", "a,a0", "b"),
        node("MatMul", "b,u", "y", "out"),
    ]
    more = {"zero": np.float32(0), "two": np.float32(2), "w0": weight(0, 64, 48), "u": weight(1, 48, 16)}
    return one_input(nodes, more | constants, (4, 16))


@kind
def branches():
    return _with_branches(
        _branch("p", "Tanh", {"w": weight(2, 48, 48)}), _branch("q", "Sigmoid", {"w": weight(3, 48, 48)}), {}
    )


@kind
def branches_that_share():
    return _with_branches(_branch("p", "Tanh"), _branch("q", "Relu"), {"w": weight(2, 48, 48)})


@kind
def branch_of_an_outer_value():
    passed = graph("q", [node("Identity", "a0", "q0")], [], [info("q0", None)], {})
    return _with_branches(_branch("p", "Tanh"), passed, {"w": weight(2, 48, 48)})


@kind
def branches_in_branches():
    nodes = [
        node("Relu", "a0", "r0"),
        node("ReduceMax", "r0", "most", keepdims=0),
        node("Greater", "most,two", "c2"),
        node(
            "If", "c2", "t9", "if2", then_branch=_branch("p", "Tanh", value="r0"), else_branch=_branch("q", "Sigmoid")
        ),
    ]
    return _with_branches(graph("t", nodes, [], [info("t9", None)], {}), _branch("e", "Tanh"), {"w": weight(2, 48, 48)})


def _loop(rounds, body, constants, scans=()):
    nodes = [
        node("MatMul", "x,v", "s0"),
        node("Loop", "rounds,true,s0", ["s1", *scans], "loop", body=body),
        node("Add", "s1,s0", "s2"),
        node("MatMul", "s2,u", "y"),
    ]
    more = {"rounds": np.int64(rounds), "true": np.bool_(True), "v": weight(0, 64, 32), "u": weight(1, 32, 16)}
    return one_input(nodes, more | constants, (4, 16))


def _body(nodes, constants, outputs=()):
    nodes = [node("MatMul", "st,w", "m0", "bm"), node("Tanh", "m0", "t0"), *nodes, node("Identity", "go", "on")]
    inputs = [info("i", [], I64), info("go", [], BOOL), info("st", [4, 32])]
    return graph("body", nodes, inputs, [info("on", [], BOOL), info("t1", [4, 32]), *outputs], constants)


def _loop_kind(rounds):
    return lambda: _loop(rounds, _body([node("Add", "t0,s0", "t1")], {"w": weight(2, 32, 32)}), {})


KINDS["loop"] = _loop_kind(3)
KINDS["loop_of_no_round"] = _loop_kind(0)


@kind
def loop_with_a_branch_and_a_list():
    then = graph("p", [node("MatMul", "t0,w2", "p0", "same")], [], [info("p0", None)], {})
    other = graph("q", [node("MatMul", "st,w", "q0", "same")], [], [info("q0", None)], {})
    nodes = [
        node("Greater", "i,zero", "c"),
        node("If", "c", "t1", "if", then_branch=then, else_branch=other),
        node("Identity", "t1", "kept"),
    ]
    body = _body(nodes, {"w": weight(2, 32, 32), "zero": np.int64(0)}, [info("kept", None)])
    made, feed = _loop(3, body, {"w2": weight(3, 32, 32)}, ["all"])
    made.graph.output.append(info("all", None))
    return made, feed


@kind
def scan():
    nodes = [
        node("Add", "st,row", "a0"),
        node("Tanh", "a0", "st1"),
        node("Unsqueeze", "st1,ax", "r"),
        node("MatMul", "r,u", "o"),
    ]
    body = graph("body", nodes, [info("st", [32]), info("row", [32])], [info("st1", [32]), info("o", [1, 16])],
                 {"u": weight(1, 32, 16), "ax": np.array([0])})  # fmt: skip
    nodes = [node("MatMul", "x,v", "h"), node("Scan", "first,h", ["last", "y"], "scan", body=body, num_scan_inputs=1)]
    return one_input(nodes, {"v": weight(2, 64, 32), "first": np.zeros(32, np.float32)}, None)


@kind
def functions():
    body = [node("MatMul", "a,b", "c", "inner"), node("Tanh", "c", "d", "inner2")]
    made = onnx.FunctionProto(
        domain="local", name="Layer", input=["a", "b"], output=["d"], node=body, opset_import=[opset_id("", 17)]
    )
    nodes = [
        node("Layer", "x,w", "h", "one", domain="local"),
        node("Layer", "h,v", "y", "two", domain="local"),
    ]
    return one_input(nodes, {"w": weight(0, 64, 64), "v": weight(1, 64, 48)}, (4, 48), functions=[made])


def _recurrent(op_type, gates, **attributes):
    def build():
        directions = 2 if attributes.get("direction") == "bidirectional" else 1
        constants = {
            "W": floats(0, directions, gates * 16, 32, scale=0.15),
            "R": floats(1, directions, gates * 16, 16, scale=0.2),
            "B": floats(2, directions, 2 * gates * 16, scale=0.1),
            "u": weight(3, 16, 8),
        }
        nodes = [
            node(op_type, "x,W,R,B", ["h"], "rnn", hidden_size=16, **attributes),
            node("MatMul", "h,u", "y", "out"),
        ]
        return model(nodes, [info("x", [5, 2, 32])], [info("y", None)], constants), lambda seed: {
            "x": floats(seed, 5, 2, 32)
        }

    return build


KINDS["lstm"] = _recurrent("LSTM", 4)
KINDS["lstm_both_ways"] = _recurrent("LSTM", 4, direction="bidirectional")
KINDS["gru"] = _recurrent("GRU", 3, linear_before_reset=1)
KINDS["rnn"] = _recurrent("RNN", 1)


@kind
def branch_with_an_lstm():
    def branch(key, seed):
        nodes = [
            node("Conv", f"x,{key}w,{key}b", f"{key}0", pads=[1, 1]),
            node("Relu", f"{key}0", f"{key}1"),
            node("Transpose", f"{key}1", f"{key}2", perm=[2, 0, 1]),
            node("LSTM", f"{key}2,{key}W,{key}R,{key}B", ["", f"{key}h", ""], f"{key}l", hidden_size=64),
            node("Squeeze", f"{key}h,ax", f"{key}s"),
            node("MatMul", f"{key}s,{key}o", f"{key}y"),
        ]
        constants = {
            f"{key}w": floats(seed, 64, 32, 3, scale=0.1),
            f"{key}b": floats(seed + 1, 64, scale=0.1),
            f"{key}W": floats(seed + 2, 1, 256, 64, scale=0.1),
            f"{key}R": floats(seed + 3, 1, 256, 64, scale=0.1),
            f"{key}B": floats(seed + 4, 1, 512, scale=0.1),
            f"{key}o": weight(seed + 5, 64, 2),
        }
        return graph(key, nodes, [], [info(f"{key}y", None)], constants)

    nodes = [
        node("Equal", "rate,k16", "cond"),
        node("If", "cond", "z", "if", then_branch=branch("a", 0), else_branch=branch("b", 9)),
        node("Sigmoid", "z", "y"),
    ]
    constants = {"k16": np.array([16000]), "ax": np.array([0])}
    made = model(nodes, [info("x", [1, 32, 32]), info("rate", [1], I64)], [info("y", None)], constants)
    return made, lambda seed: {"x": floats(seed, 1, 32, 32), "rate": np.array([16000])}
