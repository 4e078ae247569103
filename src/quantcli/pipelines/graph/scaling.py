"""A searched scale of a tensor inside a graph, folded into what makes it: a gain, or an earlier product."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantcli.algorithms import Step
from quantcli.graphs.model.files import Graph
from quantcli.graphs.walk.folds import GraphFold, Slot, read_initializer, write_initializer
from quantcli.models.folds import divide_rows, folded_norm
from quantcli.scheme import Scheme
from quantcli.tensors import grids
from quantcli.tensors.hessian import Statistics
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["GraphScaling"]


class GraphScaling:
    """Scales tensors. The graph itself stays as it is until `apply`: later stages are still to run through it."""

    def __init__(self, graph: Graph, step: Step, folds: Mapping[str, GraphFold]):
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
            gain, found = folded_norm(torch.from_numpy(fold.gain.read()), found, False)
            self._slots.append((fold.gain, gain))
        elif fold.product in results:
            results[fold.product] = grids.divide_rows(results[fold.product], natural, found)
        else:
            self._products[fold.product] = (found, fold.rows_first)
        for bias in fold.biases:
            self._slots.append((bias, divide_rows(torch.from_numpy(bias.read()), natural, found)))
        return found

    def apply(self) -> None:
        """Puts the divided gains, biases and float weights into the graph."""
        for slot, values in self._slots:
            slot.write(values.numpy())
        for name, (scale, rows_first) in self._products.items():
            values = torch.from_numpy(read_initializer(self._graph, name))
            divided = divide_rows(values, torch.arange(len(scale)), scale, transposed=not rows_first)
            write_initializer(self._graph, name, divided.numpy())
        self._slots, self._products = [], {}
