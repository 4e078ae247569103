"""Nodes without weights: elementwise, shapes, reductions, choices."""

import numpy as np

from graph_scope import Scope, Tensor, UnfitError
from graph_weights import weight

__all__ = ["ELEMENTWISE"]

UNARY = {
    "Relu": (),
    "Sigmoid": (),
    "LeakyRelu": ({}, {"alpha": 0.2}),
    "Tanh": (),
    "HardSigmoid": (),
    "HardSwish": (),
    "Elu": ({}, {"alpha": 0.3}),
    "Softplus": (),
    "Erf": (),
    "Sin": (),
    "Exp": (),
    "Abs": (),
    "Neg": (),
    "Identity": (),
    "Floor": (),
    "Round": (),
    "Sign": (),
    "Gelu": ({}, {"approximate": "tanh"}),
    "Mish": (),
    "Selu": (),
    "Softsign": (),
    "Reciprocal": (),
    "Dropout": (),
}


def unary(g: Scope) -> None:
    op = g.one_of(*UNARY)
    g.add(op, [g.pick()], **g.one_of(*(UNARY[op] or ({},))))


def root(g: Scope) -> None:
    x = g.pick()
    g.add(g.one_of("Sqrt", "Log"), [g.add("Add", [g.add("Abs", [x]), g.constant(np.array(0.1, x.array.dtype))])])


def gated(g: Scope) -> None:
    """Two readers of one tensor: x * sigmoid(x)."""
    x = g.pick()
    g.add("Mul", [x, g.add(g.one_of("Sigmoid", "HardSigmoid", "Tanh"), [x])])


def clip(g: Scope) -> None:
    x = g.pick()
    low, high = g.one_of((0.0, 6.0), (-1.0, 1.0), (0.0, None), (None, 0.5), (float(np.finfo(np.float16).min), 1.0))
    if g.opset < 11:
        given = {k: v for k, v in (("min", low), ("max", high)) if v is not None}
        g.add("Clip", [x], **given)
    else:
        ends = [None if v is None else g.constant(np.array(v, x.array.dtype)) for v in (low, high)]
        g.add("Clip", [x, *(ends if ends[1] is not None else ends[:1])])


def prelu(g: Scope) -> None:
    x = g.pick(2, 3, 4)
    g.add("PRelu", [x, weight(g, g.one_of((1,), (x.shape[1], *[1] * (x.rank - 2)), x.shape[-1:]), x)])


def binary(g: Scope) -> None:
    x = g.pick()
    op = g.one_of("Add", "Mul", "Sub", "Div", "Max", "Min", "Sum", "Pow")
    kind = g.one_of("tensor", "scalar", "last", "channel", "self", "whole")
    other: Tensor
    if kind == "tensor":
        other = g.pick(when=lambda t: t.shape == x.shape and t.array.dtype == x.array.dtype)
    elif kind == "self":
        other = x
    else:
        channel = (x.shape[1], *[1] * (x.rank - 2)) if x.rank > 1 else ()
        other = weight(g, {"scalar": (), "last": x.shape[-1:], "channel": channel, "whole": x.shape}[kind], x)
    if op in ("Div", "Pow"):
        one = g.constant(np.array(0.5, x.array.dtype))
        if op == "Pow":
            other, x = g.constant(np.array(g.one_of(2, 3, 1), x.array.dtype)), x
        else:
            other = g.add("Add", [g.add("Abs", [other]), one])
    pair = [x, other] if op in ("Div", "Pow") or not g.chance(3) else [other, x]
    if op in ("Max", "Min", "Sum") and g.chance(3):
        pair.append(x)
    g.add(op, pair)


def softmax(g: Scope) -> None:
    x = g.pick(2, 3, 4)
    g.add(g.one_of("Softmax", "LogSoftmax"), [x], axis=g.one_of(x.rank - 1, 1, *([-1] if g.opset >= 11 else [])))


def concat(g: Scope) -> None:
    x = g.pick(2, 3, 4)
    axis = g.draw_axis(x)

    def fits(t: Tensor) -> bool:
        same = [a == b for i, (a, b) in enumerate(zip(t.shape, x.shape, strict=False)) if i != axis]
        return t.rank == x.rank and all(same) and t.array.dtype == x.array.dtype

    parts = [x, g.pick(when=fits)]
    shape = list(x.shape)
    shape[axis] = g.one_of(2, 0)
    if g.chance(3):
        parts.append(weight(g, tuple(shape), x))
    if g.chance(4):
        parts.append(g.add("Mul", [x, g.constant(np.array(g.one_of(1e-3, 600.0), x.array.dtype))]))
    g.add("Concat", parts, axis=axis)


def split(g: Scope) -> None:
    x = g.pick(2, 3, 4)
    axis = g.draw_axis(x)
    size = x.shape[axis]
    if size < 2:
        raise UnfitError
    if g.chance(2) and size % 2 == 0:
        g.add("Split", [x], 2, axis=axis, **({"num_outputs": 2} if g.opset >= 18 else {}))
    else:
        sizes, more = g.axes(13, "split", 1, size - 1)
        g.add("Split", [x, *sizes], 2, axis=axis, **more)


def resize(g: Scope) -> None:
    x = g.pick_filled(4)
    scales = g.constant(np.array([1, 1, 2, g.one_of(2, 1.5, 1)], np.float32))
    mode = g.one_of("nearest", "linear", "cubic")
    if g.opset < 10:
        g.add(
            "Upsample",
            [x, scales] if g.opset == 9 else [x],
            **({} if g.opset == 9 else {"scales": [1.0, 1.0, 2.0, 2.0]}),
        )
    elif g.opset == 10:
        g.add("Resize", [x, scales], mode="nearest")
    elif g.chance(3) and x.array.size:
        size = g.ints(*x.shape[:2], x.shape[2] + 3, x.shape[3] + 1)
        g.add("Resize", [x, g.constant(np.zeros(0, np.float32)) if g.opset < 13 else None, None if g.opset >= 13 else
                         g.constant(np.zeros(0, np.float32)), size], mode=mode)  # fmt: skip
    else:
        region = None if g.opset >= 13 else g.constant(np.zeros(0, np.float32))
        extra = {"coordinate_transformation_mode": g.one_of("half_pixel", "asymmetric", "align_corners")}
        g.add("Resize", [x, region, scales], mode=mode, **extra)


def pool(g: Scope) -> None:
    op = g.one_of("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool")
    x = g.pick_filled(4, 3)
    space = x.rank - 2
    attributes = {}
    if not op.startswith("Global"):
        attributes = {"kernel_shape": [g.one_of(2, 3)] * space, "strides": [g.one_of(2, 1)] * space}
        if g.chance(3):
            attributes["pads"] = [1] * 2 * space
        if op == "AveragePool" and g.chance(3):
            attributes["count_include_pad"] = 1
        if op != "LpPool" and g.opset >= 10 and g.chance(3):
            attributes["ceil_mode"] = 1
    g.add(op, [x], 2 if op == "MaxPool" and g.opset >= 8 and g.chance(4) else 1, **attributes)


def transpose(g: Scope) -> None:
    x = g.pick(2, 3, 4)
    g.add("Transpose", [x], **g.one_of({"perm": [*range(x.rank - 2), x.rank - 1, x.rank - 2]}, {}))


def reshape(g: Scope) -> None:
    x = g.pick(1, 2, 3, 4)
    batch = x.shape[0]
    rest = int(np.prod(x.shape[1:]))
    kind = g.one_of("flatten", "heads", "rows", "square", "flat")
    if kind == "flatten":
        g.add("Flatten", [x], axis=min(1, x.rank))
    elif kind == "heads" and rest % 4 == 0:
        g.add("Reshape", [x, g.ints(0, g.one_of(4, 2), -1)])
    elif kind == "square" and rest % 16 == 0:
        g.add("Reshape", [x, g.ints(batch, rest // 16, 4, 4)])
    elif kind == "rows":
        g.add("Reshape", [x, g.ints(-1, x.shape[-1])])
    else:
        g.add("Reshape", [x, g.ints(-1)])


def squeeze(g: Scope) -> None:
    x = g.pick(1, 2, 3, 4)
    if 1 in x.shape and g.chance(2):
        axes, more = g.axes(13, "axes", x.shape.index(1))
        g.add("Squeeze", [x, *axes], **more)
    else:
        axes, more = g.axes(13, "axes", g.one_of(1, 0) if x.rank else 0)
        g.add("Unsqueeze", [x, *axes], **more)


def slices(g: Scope) -> None:
    x = g.pick(1, 2, 3, 4)
    axis = g.draw_axis(x)
    start, end = g.one_of((0, 2), (1, 2**31), (-2, 2**31), (0, -1), (1, 1))
    if g.opset < 10:
        g.add("Slice", [x], axes=[axis], starts=[start], ends=[end])
    else:
        steps = [g.ints(g.one_of(1, 2))] if g.chance(3) else []
        g.add("Slice", [x, g.ints(start), g.ints(end), g.ints(axis), *steps])


def pad(g: Scope) -> None:
    x = g.pick(2, 3, 4)
    pads = [0] * (x.rank - 1) + [1] + [0] * (x.rank - 1) + [2]
    mode = g.one_of("constant", "reflect", "edge")
    filling = g.one_of(0.0, 1.0, -100.0)
    if g.opset < 11:
        g.add("Pad", [x], pads=pads, mode=mode, value=filling)
    else:
        value = [g.constant(np.array(filling, x.array.dtype))] if mode == "constant" and g.chance(2) else []
        g.add("Pad", [x, g.ints(*pads), *value], mode=mode)


def where(g: Scope) -> None:
    x = g.pick(2, 3, 4)
    low = g.constant(np.array(g.one_of(0.0, -np.inf, np.finfo(np.float32).min, -1e4)).astype(x.array.dtype))
    if g.chance(2):
        chosen = g.random().random(x.shape[-1:]) < 0.7
        chosen[:1] = True
        condition = g.constant(chosen)
    else:
        condition = g.add("Greater", [x, g.constant(np.array(0.0, x.array.dtype))])
    y = g.add("Where", [condition, x, low], masked=True)
    if not np.isfinite(y.array).all() or np.abs(low.array) > 10:
        g.pool.remove(y)
        g.add("Softmax", [y], axis=y.rank - 1)


def reduce(g: Scope) -> None:
    op = g.one_of("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "ReduceMin", "ReduceProd")
    x = g.pick(1, 2, 3, 4)
    axes, more = g.axes(13 if op == "ReduceSum" else 18, "axes", g.draw_axis(x))
    g.add(op, [x, *axes], keepdims=g.one_of(1, 0), **more)


def choice(g: Scope) -> None:
    op = g.one_of("ArgMax", "TopK", "NonZero", "Cast", "Shape", "Size", "CumSum", "ArgMin")
    x = g.pick(1, 2, 3, 4)
    axis = g.draw_axis(x)
    if op in ("ArgMax", "ArgMin"):
        g.add(op, [x], axis=axis, keepdims=g.one_of(0, 1))
    elif op == "TopK":
        k = 1 if x.shape[axis] < 2 else 2
        g.add(op, [x] if g.opset < 10 else [x, g.ints(k)], 2, axis=axis, **({"k": k} if g.opset < 10 else {}))
    elif op == "Cast":
        g.add(op, [x], to=g.one_of(7, 6, 9, 11))
    elif op == "CumSum":
        g.add(op, [x, g.constant(np.array(axis, np.int64))])
    else:
        g.add(op, [x])


def reshape_by_shape(g: Scope) -> None:
    """What exporters make of x.reshape(x.size(0), -1)."""
    x = g.pick(2, 3, 4)
    batch = g.add("Gather", [g.add("Shape", [x]), g.ints(0)])
    g.add("Reshape", [x, g.add("Concat", [batch, g.ints(-1)], axis=0)])


def other(g: Scope) -> None:
    op = g.one_of("Expand", "Tile", "DepthToSpace", "Einsum", "Trilu", "Flatten")
    x = g.pick(2, 3, 4)
    if op == "Expand":
        g.add(op, [x, g.ints(2, *x.shape)])
    elif op == "Tile":
        g.add(op, [x, g.ints(*[1] * (x.rank - 1), 2)])
    elif op == "DepthToSpace":
        g.add(op, [x], blocksize=2)
    elif op == "Einsum":
        w = weight(g, (x.shape[-1], 8), x, x.shape[-1])
        letters = "abcd"[: x.rank]
        g.add(op, [x, w], equation=f"{letters},{letters[-1]}z->{letters[:-1]}z")
    else:
        g.add(op, [x])


def half(g: Scope) -> None:
    """From here on in float16, or back."""
    x = g.pick()
    g.add("Cast", [x], to=1 if x.array.dtype == np.float16 else 10)


ELEMENTWISE = (
    *(unary, unary, unary, root, gated, clip, prelu, binary, binary, binary, softmax, concat, split, resize, pool),
    *(transpose, reshape, squeeze, slices, pad, where, reduce, choice, reshape_by_shape, other, half),
)
