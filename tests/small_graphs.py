"""Small ONNX graphs with random weights, as exporters write them."""

import numpy as np
import onnx_ir as ir

from quantcli.graphs.model.files import save_graph


class Builder:
    """A graph under construction."""

    def __init__(self, *shape, opset=17, dtype=ir.DataType.FLOAT):
        self.opset = opset
        self.x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.nodes, self.weights = [], []

    def weight(self, name, array):
        array = np.asarray(array, dtype=np.asarray(array).dtype)
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        self.weights.append(value)
        return value

    def constant(self, name, array):
        """The same as a Constant node."""
        return self.node("Constant", [], name, value=ir.Tensor(array, name=name))

    def node(self, op_type, inputs, output, node_name="", **attributes):
        node = ir.node(op_type, inputs, attributes, name=node_name)
        node.outputs[0].name = output
        self.nodes.append(node)
        return node.outputs[0]

    def save(self, path, *outputs):
        for value in outputs:
            value.dtype = value.dtype or ir.DataType.FLOAT
        imports = {"": self.opset}
        graph = ir.Graph(
            [self.x], outputs, nodes=self.nodes, initializers=self.weights, opset_imports=imports, name="g"
        )
        save_graph(ir.Model(graph, ir_version=8, metadata_props={"made_by": "test"}), path)
        return path


def cnn(path, *, opset=17, in_constants=False, uneven=False, norm=True, seed=0):
    """Conv, batch norm, Relu, Conv, pool, Gemm on [n, 3, 12, 12]; `uneven`: output channels of very different size."""
    r = np.random.default_rng(seed)
    b = Builder("n", 3, 12, 12, opset=opset)
    keep = b.constant if in_constants else b.weight

    def draw(name, *shape):
        array = r.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        if uneven:
            array *= np.logspace(-2.5, 0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        return keep(name, array.astype(np.float32))

    y = b.node("Conv", [b.x, draw("w1", 16, 3, 3, 3)], "c1", "conv1", pads=[1, 1, 1, 1])
    if norm:
        parameters = [r.uniform(0.5, 2, 16), r.normal(size=16), r.normal(size=16), r.uniform(0.5, 2, 16)]
        names = ("gamma", "beta", "mean", "var")
        values = [keep(n, p.astype(np.float32)) for n, p in zip(names, parameters, strict=True)]
        y = b.node("BatchNormalization", [y, *values], "n1", "norm1", epsilon=1e-5)
    y = b.node("Relu", [y], "r1", "relu1")
    y = b.node("Conv", [y, draw("w2", 24, 16, 3, 3), keep("b2", r.normal(size=24).astype(np.float32))], "c2", "conv2")
    y = b.node("GlobalAveragePool", [y], "p", "pool")
    y = b.node("Flatten", [y], "f", "flatten")
    y = b.node("Gemm", [y, draw("w3", 10, 24), keep("b3", r.normal(size=10).astype(np.float32))], "y", "head", transB=1)
    return b.save(path, y)


def mlp(path, *, opset=17, uneven=False, hidden=64, half=False, seed=0):
    """MatMul, Add, Relu, MatMul on [n, 32]; `uneven`: output channels of very different size; `half`: float16."""
    r = np.random.default_rng(seed)
    kind = np.float16 if half else np.float32
    b = Builder("n", 32, opset=opset, dtype=ir.DataType.from_numpy(np.dtype(kind)))
    first = r.normal(size=(32, hidden)).astype(np.float32) / 6
    second = r.normal(size=(hidden, 16)).astype(np.float32) / 8
    if uneven:
        first *= np.logspace(-2.5, 0, hidden, dtype=np.float32)
        second *= np.logspace(0, 2.5, hidden, dtype=np.float32)[::-1, None] * np.logspace(-2, 0, 16, dtype=np.float32)
    y = b.node("MatMul", [b.x, b.weight("w1", first.astype(kind))], "h", "up")
    y = b.node("Add", [y, b.weight("b1", (r.normal(size=hidden) / 8).astype(kind))], "a", "bias")
    y = b.node("Relu", [y], "r", "relu")
    y = b.node("MatMul", [y, b.weight("w2", second.astype(kind))], "y", "down")
    y.dtype = b.x.dtype
    return b.save(path, y)


def separable(path, *, opset=17, spread=1.5, seed=0):
    """Conv, depthwise Conv, grouped Conv, pool, Flatten, Gemm, MatMul on [n, 3, 8, 8], channels of very different size.

    One channel's size in one layer is made up for in the next, as batch norms leave it when they are folded.
    """
    r = np.random.default_rng(seed)
    b = Builder("n", 3, 8, 8, opset=opset)

    def draw(*shape):
        return r.normal(size=shape) / np.sqrt(np.prod(shape[1:]))

    def sizes(count):
        return np.exp(r.normal(size=count) * spread)

    s1, s2, s3, s4 = sizes(12), sizes(12), sizes(8), sizes(16)
    kernel = {n: np.reshape(s, (-1, 1, 1, 1)) for n, s in (("s1", s1), ("s2", s2), ("s3", s3))}
    w1 = draw(12, 3, 3, 3) * kernel["s1"]
    w2 = draw(12, 1, 3, 3) / kernel["s1"] * kernel["s2"]
    # in two groups: inputs 0 to 5 feed outputs 0 to 3
    w3 = draw(8, 6, 1, 1) * kernel["s3"] / np.repeat(s2.reshape(2, 6), 4, 0)[:, :, None, None]
    w4 = draw(16, 8 * 16) / np.repeat(s3, 16) * s4[:, None]
    w5 = draw(16, 10) / s4[:, None]
    f = {f"w{i}": b.weight(f"w{i}", w.astype(np.float32)) for i, w in enumerate((w1, w2, w3, w4, w5), 1)}
    b1 = b.weight("b1", (draw(12) * s1).astype(np.float32))
    b4 = b.weight("b4", (draw(16) * s4).astype(np.float32))
    y = b.node("Conv", [b.x, f["w1"], b1], "c1", "first", pads=[1, 1, 1, 1])
    y = b.node("Relu", [y], "r1", "relu1")
    y = b.node("Conv", [y, f["w2"]], "c2", "depthwise", pads=[1, 1, 1, 1], group=12)
    y = b.node("LeakyRelu", [y], "r2", "relu2", alpha=0.1)
    y = b.node("Conv", [y, f["w3"]], "c3", "grouped", group=2)
    y = b.node("MaxPool", [y], "p3", "pool", kernel_shape=[2, 2], strides=[2, 2])
    y = b.node("Flatten", [y], "f", "flatten")
    y = b.node("Gemm", [y, f["w4"], b4], "g", "hidden", transB=1)
    y = b.node("Relu", [y], "r4", "relu4")
    y = b.node("MatMul", [y, f["w5"]], "y", "head")
    return b.save(path, y)


def attention(path, *, mask=-1e4, norm=False, seed=0):
    """One head on [n, 6, 16] whose softmax leaves tokens out by adding `mask`; `norm`: a sum and a norm behind it."""
    r = np.random.default_rng(seed)
    b = Builder("n", 6, 16)
    q, k, v = (
        b.node("MatMul", [b.x, b.weight(f"w{n}", r.normal(size=(16, 16)).astype(np.float32) / 3)], n, n) for n in "qkv"
    )
    y = b.node("MatMul", [q, b.node("Transpose", [k], "kt", "turn", perm=[0, 2, 1])], "s", "scores")
    first = b.node("Slice", [b.x, *(b.weight(n, np.array([i])) for n, i in (("from", 0), ("to", 1), ("axis", 2)))], "f")
    out = b.node("Less", [b.node("Transpose", [first], "ft", perm=[0, 2, 1]), b.weight("zero", np.float32(-0.5))], "o")
    added = b.node("Where", [out, b.weight("mask", np.float32(mask)), b.weight("none", np.float32(0))], "m", "choose")
    y = b.node("Softmax", [b.node("Add", [y, added], "sm", "add")], "p", "softmax", axis=-1)
    y = b.node("MatMul", [y, v], "pv", "mix")
    if norm:
        y = b.node("Add", [y, b.x], "sum", "residual")
        y = b.node("LayerNormalization", [y, b.weight("gain", np.ones(16, np.float32))], "n", "norm")
    y = b.node("MatMul", [y, b.weight("w", r.normal(size=(16, 8)).astype(np.float32) / 4)], "y", "out")
    return b.save(path, y)
