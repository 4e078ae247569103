"""A searched scale of a tensor inside a graph, folded into what makes it: a gain, or an earlier product."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from quantcli.algorithms import Step
from quantcli.graphs.folds import GraphFold, Slot
from quantcli.models.folds import divide_rows, folded_norm
from quantcli.scheme import Scheme
from quantcli.tensors import grids
from quantcli.tensors.hessian import Statistics
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["GraphScaling"]


class GraphScaling:
    """Scales tensors. The graph itself stays as it is until `apply`: later stages are still to run through it."""

    def __init__(self, graph: ir.Graph, step: Step, folds: Mapping[str, GraphFold]):
        """Nothing is changed yet.

        Args:
            graph: The float graph.
            step: The transform that searches.
            folds: What makes each tensor that can be scaled.
        """
        self._graph, self._step, self._folds = graph, step, folds
        self._slots: list[tuple[Slot, Tensor]] = []
        self._products: dict[str, tuple[Tensor, bool]] = {}

    def scale(
        self,
        tensor: str,
        weights: Sequence[Tensor],
        schemes: Sequence[Scheme],
        statistics: Statistics,
        results: dict[str, QuantizedTensor],
        quantized: frozenset[str],
    ) -> Tensor | None:
        """The scale [K] of a tensor, if one helps.

        Args:
            tensor: Its name.
            weights: [N, K] float32, all that it is multiplied with.
            schemes: The grid of each.
            statistics: Of the tensor.
            results: Finished matrices; a product among them is divided in place.
            quantized: Names of all matrices that are or will be quantized.
        """
        fold = self._folds.get(tensor)
        if fold is None or (fold.product in quantized and fold.product not in results):
            return None  # a product that is not finished yet would be scaled by what nobody remembers
        natural = torch.arange(weights[0].shape[1])
        found: Tensor | None = self._step.algorithm.run(weights, schemes, self._step.settings, statistics, natural)
        if found is None:
            return None
        if fold.gain is not None:
            gain, found = folded_norm(_values(fold.gain), found, False)
            self._slots.append((fold.gain, gain))
        elif fold.product in results:
            results[fold.product] = grids.divide_rows(results[fold.product], natural, found)
        else:
            self._products[fold.product] = (found, fold.rows_first)
        for bias in fold.biases:
            self._slots.append((bias, divide_rows(_values(bias), natural, found)))
        return found

    def apply(self) -> None:
        """Puts the divided gains, biases and float weights into the graph."""
        for slot, values in self._slots:
            self._replace(slot, values)
        for name, (scale, rows_first) in self._products.items():
            stored = self._graph.initializers[name].const_value
            assert stored is not None
            divided = divide_rows(_tensor(stored), torch.arange(len(scale)), scale, transposed=not rows_first)
            self._graph.initializers[name].const_value = ir.Tensor(divided.numpy(), name=name)
        self._slots, self._products = [], {}

    def _replace(self, slot: Slot, values: Tensor) -> None:
        """Other readers of the same initializer keep it as it is."""
        old = slot.node.inputs[slot.index]
        assert old is not None and old.const_value is not None
        array = values.numpy().reshape(old.const_value.shape.numpy())
        if len(old.uses()) == 1:
            old.const_value = ir.Tensor(array, name=old.name)
            return
        tensor = ir.Tensor(array, name=f"{old.name}.{slot.node.name or slot.node.outputs[0].name}")
        new = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self._graph.register_initializer(new)
        slot.node.replace_input_with(slot.index, new)


def _values(slot: Slot) -> Tensor:
    """[K] in the stored dtype."""
    value = slot.node.inputs[slot.index]
    assert value is not None and value.const_value is not None
    return _tensor(value.const_value).reshape(-1)


def _tensor(stored: ir.TensorProtocol) -> Tensor:
    return torch.from_numpy(np.array(stored.numpy()))
