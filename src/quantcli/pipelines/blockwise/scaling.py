"""A searched scale of a linear's input, folded into what makes that input: a norm, or another linear."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.models.folds import Fold, divide_rows, folded_norm
from quantcli.models.layout import is_transposed
from quantcli.models.skeleton import disk_name
from quantcli.pipelines.planning.plan import Plan, Target
from quantcli.tensors import grids
from quantcli.tensors.hessian import Statistics
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["Place", "Scaling"]


@dataclass(frozen=True)
class Place:
    """Where an input may be scaled."""

    path: str
    """Of the block."""
    fold: Fold
    """Of the input."""
    results: dict[str, QuantizedTensor]
    """What the block has of results; a producer among them is divided in place."""


class Scaling:
    """Scales inputs and keeps the tensors that this has changed until they are written."""

    def __init__(self, plan: Plan):
        """Nothing is changed yet."""
        self.edited: dict[str, Tensor] = {}
        """Tensors that stay float, as folds have changed them, by name on disk; until their block is written."""
        self._plan = plan

    def scale(
        self, targets: Sequence[Target], weights: Sequence[Tensor], statistics: Statistics, place: Place
    ) -> Tensor | None:
        """The scale [K] of an input, if one helps; what makes the input is divided by it.

        Args:
            targets: The linears that read it.
            weights: [N, K] float32 of each.
            statistics: Of the input.
            place: What makes it.
        """
        step, fold, results = self._plan.scaling, place.fold, place.results
        assert step is not None
        given = torch.arange(targets[0].columns) if fold.rows is None else fold.rows
        rows, shared = torch.unique(given.to(self._plan.device), return_inverse=True)
        found: Tensor | None = step.algorithm.run(
            weights, [t.scheme for t in targets], step.settings, statistics, shared
        )
        if found is None:
            return None
        producer = f"{place.path}.{fold.producer}"
        if fold.is_norm:
            gain, found = folded_norm(self._stored(f"{producer}.weight").to(found.device), found, fold.offset)
            self.edited[self._disk(f"{producer}.weight")] = gain.cpu()
        elif producer in results:
            results[producer] = grids.divide_rows(results[producer], rows, found)
        else:
            target = self._stored(f"{producer}.weight")
            transposed = is_transposed(self._plan.skeleton.get_submodule(producer))
            self.edited[self._disk(f"{producer}.weight")] = divide_rows(target, rows.cpu(), found.cpu(), transposed)
        if getattr(self._plan.skeleton.get_submodule(producer), "bias", None) is not None:
            bias = self._stored(f"{producer}.bias")
            self.edited[self._disk(f"{producer}.bias")] = divide_rows(bias, rows.cpu(), found.cpu())
        columns: Tensor = found[shared]
        return columns

    def _disk(self, name: str) -> str:
        disk = disk_name(name, self._plan.skeleton, self._plan.checkpoint.entries)
        assert disk is not None
        return disk

    def _stored(self, name: str) -> Tensor:
        """A tensor that stays float, as it will be written but for folds."""
        disk = self._disk(name)
        if disk in self.edited:
            return self.edited[disk]
        tensor = self._plan.checkpoint.read(disk)
        return tensor.to(self._plan.float_dtype(tensor.dtype))
