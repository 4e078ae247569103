"""Nodes that hold graphs: If, Loop and Scan, whose bodies read what lies around them."""

from collections.abc import Callable, Sequence

import numpy as np

from graph_elementwise import ELEMENTWISE
from graph_products import PRODUCTS
from graph_scope import Scope, Tensor, UnfitError, declared
from graph_weights import weight

__all__ = ["BODIES", "OPERATORS", "grow"]


def grow(g: Scope, count: int, kinds: Sequence[Callable[[Scope], None]]) -> None:
    """Adds `count` drawn kinds of nodes; those that do not fit are left out."""
    for _ in range(count):
        try:
            g.one_of(*kinds)(g)
        except UnfitError:
            continue


def _result(g: Scope, tensor: Tensor) -> Tensor:
    """The tensor as one that a node of this scope makes, as outputs of bodies have to be."""
    made = {value for node in g.nodes for value in node.outputs}
    return tensor if tensor.value in made else g.add("Identity", [tensor])


def branches(g: Scope) -> None:
    """Both branches may use the same names, for themselves and inside."""
    x = g.pick(2, 3, 4)
    if g.chance(2):
        total = x
        for axis in reversed(range(x.rank)):
            axes, more = g.axes(13, "axes", axis)
            total = g.add("ReduceSum", [total, *axes], keepdims=0, **more)
            g.pool.remove(total)
        condition = g.add("Greater", [total, g.constant(np.array(g.one_of(0, 1e9)).astype(x.array.dtype))])
    else:
        condition = g.constant(np.array(g.one_of(True, False)))
    name, graphs, captured, results = g.name("if"), [], {}, []
    for side in ("then", "else"):
        body = Scope(g.draw, g.opset, g, g.one_of(f"{name}_", f"{name}_{side}_"))
        grow(body, g.one_of(1, 2, 3), PRODUCTS + ELEMENTWISE if g.chance(4) or g.outer else OPERATORS)
        results.append(_result(body, body.pick(dtypes=(x.array.dtype,))))
        graphs.append(body.graph([results[-1]], side))
        captured |= body.captured
    if results[0].rank != results[1].rank:
        raise UnfitError
    reads = list(captured.values())
    g.add("If", [condition], reads=reads, then_branch=graphs[0], else_branch=graphs[1])


def loop(g: Scope) -> None:
    x = g.pick(2, 3)
    body = Scope(g.draw, g.opset, g, f"{g.name('loop')}_")
    before = _body_input(body, np.array(0, np.int64))
    going = _body_input(body, np.array(True))
    state = _body_input(body, x.array)
    body.pool.append(state)
    w = weight(g.one_of(body, g), (x.shape[-1],) * 2, x, x.shape[-1])
    y = body.add(g.one_of("Tanh", "Relu", "Sigmoid"), [body.add("MatMul", [state, w])])
    grow(body, g.one_of(0, 1), ELEMENTWISE)
    same = [t for t in body.pool if t.shape == x.shape and t.array.dtype == x.array.dtype and t is not state]
    outputs = [body.add("Identity", [going]), (same or [y])[-1]]
    body.inputs = [before, going, state]
    scanned = g.chance(2)
    if scanned:
        outputs.append(body.add("Identity", [y]))
    count, go = g.constant(np.array(g.one_of(2, 3), np.int64)), g.constant(np.array(True))
    graph = body.graph(outputs, "body")
    g.add("Loop", [count, go, x], 2 if scanned else 1, reads=list(body.captured.values()), body=graph)


def scan(g: Scope) -> None:
    """A recurrence over the first axis, as of a cell that is written out."""
    x = g.pick(2, 3, when=lambda t: t.shape[0] > 0)
    if g.opset < 9:
        raise UnfitError
    body = Scope(g.draw, g.opset, g, f"{g.name('scan')}_")
    size = g.one_of(8, 16)
    state = _body_input(body, np.zeros((*x.shape[1:-1], size), x.array.dtype))
    row = _body_input(body, x.array[0])
    body.inputs = [state, row]
    w, u = weight(body, (x.shape[-1], size), x, x.shape[-1]), weight(body, (size, size), x, size)
    added = body.add("Add", [body.add("MatMul", [row, w]), body.add("MatMul", [state, u])])
    after = body.add("Tanh", [added])
    graph = body.graph([after, body.add("Identity", [after])], "body")
    first = g.constant(state.array)
    g.add("Scan", [first, x], 2, reads=list(body.captured.values()), body=graph, num_scan_inputs=1)


def _body_input(g: Scope, array: np.ndarray) -> Tensor:
    made = g.own(Tensor(declared(g.name("in"), array), array))
    return made


BODIES = (branches, loop, scan)
OPERATORS = PRODUCTS * 2 + ELEMENTWISE + BODIES
