"""The weight of a graph that is no number, for whoever found that its outputs are none."""

import numpy as np
import onnx_ir as ir

__all__ = ["name_not_finite"]


def name_not_finite(model: ir.Model) -> str | None:
    """The first initializer with NaN, else the first with infinity, which may be a mask; None where all are finite."""
    infinite = None
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or 0 in tensor.shape.numpy():
                continue
            array = tensor.numpy().astype(np.float32)
            if np.isnan(array.min()):  # NaN goes through, without a copy
                return name
            if infinite is None and not (np.isfinite(array.min()) and np.isfinite(array.max())):
                infinite = name
    return infinite
