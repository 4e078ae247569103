"""Cross-layer equalization: neighbouring layers share out the ranges of their channels, so one scale fits all of them.

Markus Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(https://arxiv.org/abs/1906.04721), section 4.1. Channel i between two linears with ranges r1[i] of the first one's row
and r2[i] of the second one's column is divided by s[i] = sqrt(r1[i] / r2[i]) in the first and multiplied in the second:
both ranges become sqrt(r1[i] r2[i]). Repeated over all pairs until nothing moves. The float function stays.

Where this differs from the paper: clipped activations (Relu6) are no pair, the paper makes Relu of them and so changes
the function; large biases are not moved into the next layer, which is not exact where that one pads.
"""

import numpy as np
import onnx_ir as ir

from quantcli.graphs.rewrite.makers import Maker, find_maker
from quantcli.graphs.walk.channels import (
    column_sizes,
    constant_of,
    has_weight,
    scale_columns,
    weight_rows,
    weight_width,
)
from quantcli.graphs.walk.origins import shapes_of

__all__ = ["equalize"]

_SWEEPS = 50
_STILL = 1e-3
"""Sweeps end where no factor is further from 1."""


def equalize(model: ir.Model) -> list[tuple[str, str]]:
    """Equalizes all pairs of neighbouring linears, in place.

    Args:
        model: Float graph with inferred shapes whose nodes have names, batch norms folded.

    Returns:
        Names of the pairs, first and second.
    """
    pairs = _pairs(model)
    for _ in range(_SWEEPS):
        moved = [_balance(maker, node) for maker, node in pairs]
        if max(moved, default=0) < _STILL:
            break
    return [(str(m.linear.name), str(n.name)) for m, n in pairs if m.linear is not None]


def _pairs(model: ir.Model) -> list[tuple[Maker, ir.Node]]:
    found = []
    shapes = shapes_of(model)
    for node in model.graph:
        if not has_weight(node) or node.op_type == "ConvTranspose" or node.attributes.get_int("transA", 0) != 0:
            continue
        x, weight = node.inputs[:2]
        if node.op_type == "MatMul" and (weight is None or weight.shape is None or len(weight.shape) != 2):
            continue
        axis = -1 if node.op_type in ("Gemm", "MatMul") else 1 - len(x.shape) if x is not None and x.shape else 0
        maker = find_maker(x, axis, weight_width(node), [node], shapes)
        if maker is not None and maker.linear is not None:
            found.append((maker, node))
    return found


def _balance(maker: Maker, node: ir.Node) -> float:
    """Shares out the ranges of one pair; the largest |log s|."""
    assert maker.linear is not None
    weight = constant_of(maker.linear.inputs[1])
    assert weight is not None
    axis = weight_rows(maker.linear)
    first = np.abs(weight.astype(np.float64)).max(tuple(i for i in range(weight.ndim) if i != axis))
    second = column_sizes(node).reshape(-1, maker.repeat).max(1)
    used = (first > 0) & (second > 0)  # a dead channel has nothing to share
    scale = np.sqrt(np.where(used, first, 1) / np.where(used, second, 1))
    maker.divide(scale)
    scale_columns(node, np.repeat(scale, maker.repeat))
    return float(np.abs(np.log(scale)).max())
