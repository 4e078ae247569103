"""A searched scale of a linear's input, folded into what makes that input: a norm, or another linear."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.algorithms.transforms.smoothquant import Factors
from quantcli.models.folds import Fold, divide_rows, folded_norm
from quantcli.models.layout import is_transposed
from quantcli.models.skeleton import disk_name
from quantcli.pipelines.planning.plan import Plan
from quantcli.pipelines.planning.target import Target
from quantcli.tensors import grids
from quantcli.tensors.channels import Channels
from quantcli.tensors.hessian import Statistics
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["Place", "ScaleReport", "Scaling", "Seen"]


@dataclass(frozen=True)
class Place:
    """Where an input may be scaled."""

    path: str
    """Of the block."""
    fold: Fold
    """Of the input."""
    results: dict[str, QuantizedTensor]
    """What the block has of results; a producer among them is divided in place."""


@dataclass(frozen=True)
class Seen:
    """What is known of an input."""

    statistics: Statistics | None
    channels: Channels | None


@dataclass(frozen=True)
class ScaleReport:
    """What a search came to for one input."""

    linears: list[str]
    """Those that read it."""
    producer: str
    """What makes it."""
    alpha: float | None
    """Share of the difficulty that weights take; None where the input is left as it is."""
    relative_error: float | None
    """Squared error of the product, both sides rounded, over that without scaling; None where nothing was searched."""


class Scaling:
    """Scales inputs and keeps the tensors that this has changed until they are written."""

    def __init__(self, plan: Plan, reports: list[ScaleReport]):
        """Nothing is changed yet.

        Args:
            plan: With the transform that finds scales.
            reports: To which one is added for each search that tells of itself.
        """
        self._reports = reports
        self.edited: dict[str, Tensor] = {}
        """Tensors that stay float, as folds have changed them, by name on disk; until their block is written."""
        self._plan = plan

    def scale(self, targets: Sequence[Target], weights: Sequence[Tensor], seen: Seen, place: Place) -> Tensor | None:
        """The scale [K] of an input, if one helps; what makes the input is divided by it.

        Args:
            targets: The linears that read it.
            weights: [N, K] float32 of each.
            seen: Of the input.
            place: What makes it.
        """
        fold, results = place.fold, place.results
        given = torch.arange(targets[0].columns) if fold.rows is None else fold.rows
        rows, shared = torch.unique(given.to(self._plan.device), return_inverse=True)
        producer = f"{place.path}.{fold.producer}"
        found = self._find(targets, weights, seen, shared, producer)
        if found is None:
            return None
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

    def multiply(self, targets: Sequence[Target], scale: Tensor) -> None:
        """Multiplies the columns of linears that stay float by a scale [K]."""
        factors = scale.cpu()
        for target in targets:
            weight = self._stored(f"{target.name}.weight")
            columns = factors[:, None] if target.transposed else factors
            self.edited[target.disk] = (weight.float() * columns).to(weight.dtype)

    def _find(
        self, targets: Sequence[Target], weights: Sequence[Tensor], seen: Seen, shared: Tensor, producer: str
    ) -> Tensor | None:
        """What the transform finds, [R]."""
        step, schemes = self._plan.scaling, [t.scheme for t in targets]
        assert step is not None
        if step.algorithm.sees == "moments":
            scale: Tensor | None = step.algorithm.run(weights, schemes, step.settings, seen.statistics, shared)
            return scale
        names = [t.name for t in targets]
        found: Factors = step.algorithm.run(names, weights, schemes, step.settings, seen.channels, shared)
        self._reports.append(ScaleReport(names, producer, found.alpha, found.relative_error))
        return found.scale

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
