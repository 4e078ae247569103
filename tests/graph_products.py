"""Nodes with weights: products, convolutions, recurrences, norms."""

import numpy as np

from graph_scope import Scope, Tensor
from graph_weights import weight

__all__ = ["PRODUCTS"]


def matmul(g: Scope) -> None:
    x = g.pick(2, 3, 4)
    columns = g.one_of(48, 16, 64, 1, 33)
    kind = g.one_of("plain", "plain", "plain", "batch", "vector", "left")
    rows = x.shape[-1]
    if kind == "left":
        w = weight(g, (columns, x.shape[-2]), x, x.shape[-2], -2)
        g.add("MatMul", [w, x])
    elif kind == "vector":
        g.add("MatMul", [x, weight(g, (rows,), x, rows)])
    else:
        batch = x.shape[:-2] if kind == "batch" else ()
        y = g.add("MatMul", [x, weight(g, (*batch, rows, columns), x, rows)])
        if g.chance(2) and kind == "plain":
            bias = weight(g, g.one_of((columns,), (1, columns), (1,)), y)
            g.add("Add", g.one_of([y, bias], [bias, y]))


def matmul_of_activations(g: Scope) -> None:
    x = g.pick(2, 3, 4)
    y = g.pick(when=lambda t: t.rank == x.rank and t.shape[:-2] == x.shape[:-2] and t.shape[-1] == x.shape[-1])
    order = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
    scores = g.add("MatMul", [x, g.add("Transpose", [y], perm=order)])
    if g.chance(2):
        kind = g.one_of(-np.inf, np.finfo(scores.array.dtype).min, -1e4)
        size = scores.shape[-2:]
        mask = np.triu(np.full(size, kind, scores.array.dtype), 1 + max(size[1] - size[0], 0))
        scores = g.add("Add", [scores, g.constant(mask)], masked=True)
        g.pool.remove(scores)
    g.add("Softmax", [scores], axis=scores.rank - 1)


def gemm(g: Scope) -> None:
    a = g.pick(2)
    across, trans_b = g.chance(3), g.chance(2)
    rows, inner = a.shape[::-1] if across else a.shape
    columns = g.one_of(32, 48, 1, 17)
    b = weight(g, (columns, inner) if trans_b else (inner, columns), a, inner, 0 if trans_b else 1)
    shapes = [(columns,), (columns,), (1, columns), (rows, 1), (1,), (), (rows, columns)]
    shape = g.one_of(*shapes, *([None] if g.opset >= 11 else []))
    inputs = [a, b] if shape is None else [a, b, weight(g, shape, a)]
    g.add(
        "Gemm",
        inputs,
        alpha=g.one_of(1.0, 1.0, 0.5, -2.0, 0.0),
        beta=g.one_of(1.0, 1.0, 2.0, -0.25, 0.0),
        transA=int(across),
        transB=int(trans_b),
    )


def conv(g: Scope) -> None:
    x = g.pick_filled(4, 3, 5, 4)
    channels, space = x.shape[1], x.rank - 2
    groups = g.one_of(1, 1, channels, *([2] if channels % 2 == 0 else []))
    out = groups * g.one_of(8 if groups == 1 else 1, 1, 2)
    kernel = [g.one_of(3, 1, 2) for _ in range(space)]
    fan_in = channels // groups * int(np.prod(kernel))
    inputs = [x, weight(g, (out, channels // groups, *kernel), x, fan_in, 0)]
    if g.chance(2):
        inputs.append(weight(g, (out,), x))
    attributes = {"group": groups, "strides": [g.one_of(1, 2)] * space, "dilations": [g.one_of(1, 1, 2)] * space}
    pads = g.one_of("same", "none", "upper", "uneven")
    if pads == "upper" and attributes["dilations"][0] == 1:
        attributes["auto_pad"] = "SAME_UPPER"
    elif pads in ("same", "uneven"):
        attributes["pads"] = [1] * space + [1 if pads == "same" else 2] * space
    if g.chance(3):
        attributes["kernel_shape"] = kernel
    g.add("Conv", inputs, **attributes)


def conv_transpose(g: Scope) -> None:
    x = g.pick_filled(4, 3)
    channels, space = x.shape[1], x.rank - 2
    groups = g.one_of(1, 1, channels)
    out = g.one_of(8, 1, 2)
    inputs = [x, weight(g, (channels, out, *[3] * space), x, channels // groups * 3, 1)]
    if g.chance(2):
        inputs.append(weight(g, (out * groups,), x))
    stride = g.one_of(2, 1)
    attributes = {"group": groups, "strides": [stride] * space, "pads": [1] * 2 * space}
    if stride == 2 and g.chance(2):
        attributes["output_padding"] = [1] * space
    g.add("ConvTranspose", inputs, **attributes)


def recurrence(g: Scope) -> None:
    kind = g.one_of("LSTM", "GRU", "RNN")
    gates, size = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], g.one_of(16, 4)
    way = g.one_of("forward", "bidirectional", "reverse")
    ways = 2 if way == "bidirectional" else 1
    x = g.pick_filled(3)
    inputs: list[Tensor | None] = [
        x,
        weight(g, (ways, gates * size, x.shape[-1]), x, x.shape[-1], 1),
        weight(g, (ways, gates * size, size), x, size, 1),
    ]
    if g.chance(2):
        inputs.append(weight(g, (ways, 2 * gates * size), x))
    attributes = {"hidden_size": size, "direction": way}
    if kind == "GRU" and g.chance(2):
        attributes["linear_before_reset"] = 1
    y = g.add(kind, inputs, g.one_of(1, 2), **attributes)
    if ways == 1 and g.chance(2):
        axes, more = g.axes(13, "axes", 1)
        g.add("Squeeze", [y, *axes], **more)


def norm(g: Scope) -> None:
    kind = g.one_of("LayerNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization")
    if kind == "LayerNormalization":
        x = g.pick_filled(2, 3, 4)
        inputs = [x, weight(g, x.shape[-1:], x), *([weight(g, x.shape[-1:], x)] if g.chance(2) else [])]
        g.add(kind, inputs, axis=-1)
        return
    x = g.pick_filled(4, 3) if kind != "BatchNormalization" else g.pick_filled(4, 3, 2)
    channels = x.shape[1:2]
    if kind == "BatchNormalization":
        mean, variance = (g.constant(f(g.random().random(channels).astype(x.array.dtype))) for f in (np.sin, np.exp))
        g.add(kind, [x, weight(g, channels, x), weight(g, channels, x), mean, variance])
    elif kind == "InstanceNormalization":
        g.add(kind, [x, weight(g, channels, x), weight(g, channels, x)])
    else:
        sizes = channels if g.opset >= 21 else (1,)
        g.add(kind, [x, weight(g, sizes, x), weight(g, sizes, x)], num_groups=1)


def gather(g: Scope) -> None:
    """Rows of a table by integers, or of an activation by constants."""
    integers = (np.dtype(np.int64), np.dtype(np.int32))
    if g.chance(3):
        x = g.pick(2, 3, 4)
        axis = g.draw_axis(x)
        chosen = g.random().integers(-x.shape[axis], x.shape[axis], g.one_of((3,), (), (2, 2), (0,)))
        g.add("Gather", [x, g.constant(chosen.astype(np.int64))], axis=axis)
        return
    ids = g.pick(1, 2, when=lambda t: t.array.size > 0 and 0 <= t.array.min() <= t.array.max() < 32, dtypes=integers)
    like = g.pick(dtypes=(np.dtype(np.float32),))
    table = weight(g, (32, g.one_of(16, 64)), like, 16)
    y = g.add("Gather", [table, ids])
    if g.chance(2):
        g.add("MatMul", [y, g.add("Transpose", [table])])


PRODUCTS = (matmul, matmul_of_activations, gemm, conv, conv_transpose, recurrence, norm, gather)
