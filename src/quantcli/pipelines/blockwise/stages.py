"""One stage: linears that share an input, read, solved by what was seen of that input, and reported."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantcli.algorithms import find
from quantcli.formats.fused import fused_shards
from quantcli.models.gathering import StageMoments
from quantcli.pipelines.blockwise.scaling import Place, Scaling, Seen
from quantcli.pipelines.blockwise.solve import read_weight, solve_linears
from quantcli.pipelines.planning.plan import Plan
from quantcli.pipelines.planning.target import Target
from quantcli.pipelines.planning.targets import is_expert
from quantcli.progress import Progress
from quantcli.report.layer import LayerReport
from quantcli.report.outliers import OutlierReport
from quantcli.tensors.activations import stored_input_scale
from quantcli.tensors.hessian import Statistics
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["FEW_TOKENS", "StageSolver"]

FEW_TOKENS = 16
"""An expert that sees fewer is quantized by its weights alone: its second moments are of too low a rank to tell."""


class StageSolver:
    """Quantizes the linears of a run, stage by stage."""

    def __init__(
        self,
        plan: Plan,
        scaling: Scaling,
        reports: list[LayerReport],
        outliers: list[OutlierReport],
        progress: Progress,
    ):
        """Nothing is quantized yet.

        Args:
            plan: With the rounder and the scheme of every linear.
            scaling: Keeps what scales of inputs change elsewhere.
            reports: To which one is added for each linear.
            outliers: To which one is added for each input whose outliers are counted.
            progress: Warned where a linear saw no token.
        """
        self._plan, self._scaling, self._progress = plan, scaling, progress
        self._reports, self._outliers = reports, outliers

    def solve(
        self, targets: Sequence[Target], moments: StageMoments | None, place: Place | None = None
    ) -> tuple[dict[str, QuantizedTensor], Tensor | None]:
        """Quantizes linears that share an input.

        Args:
            targets: The linears.
            moments: Of their input, where tokens reached it.
            place: What makes their input, where that may be scaled.

        Returns:
            What was computed, and [K] by which their columns were scaled beforehand, if they were.
        """
        plan = self._plan
        weights = {t.name: read_weight(plan.checkpoint, t, plan.source_of(t)).to(plan.device) for t in targets}
        algorithm, settings, statistics = plan.algorithm, plan.settings, None
        fewest = FEW_TOKENS if is_expert(targets[0], plan.skeleton) else 1
        if moments is not None and moments.tokens and (moments.tokens >= fewest or not plan.calibrates):
            statistics = _statistics(moments)
        elif algorithm.calibration == "required" and algorithm.sees == "moments":  # the run names those at its end
            algorithm = find("kquant")
            settings = algorithm.options()
        scale = None
        step = plan.scaling
        told = statistics is not None or (step is not None and step.algorithm.sees == "channels")
        if place is not None and moments is not None and moments.tokens and told:
            scale = self._scaling.scale(targets, list(weights.values()), Seen(statistics, moments.channels), place)
        if moments is not None and moments.outliers is not None:
            names, scaled = [t.name for t in targets], scale is not None
            self._outliers.append(OutlierReport.of(names, moments.outliers, scaled=scaled))
        results, reports = solve_linears(targets, weights, algorithm, settings, statistics, scale)
        self._reports += reports
        stored = self._input_scale(targets, moments, scale)
        return {name: replace(tensor, input_scale=stored) for name, tensor in results.items()}, scale

    def _input_scale(
        self, targets: Sequence[Target], moments: StageMoments | None, scale: Tensor | None
    ) -> Tensor | None:
        """[1] float32 that is stored of the input of linears, where their layout rounds it by one."""
        activations = self._plan.activations
        if activations is None or not activations.stored:
            return None
        channels = moments.channels if moments is not None else None
        if channels is None or not channels.tokens:
            self._progress.warn(
                f"no calibration token reached {targets[0].name}: its input is rounded as if its largest value were 1"
            )
            largest = torch.ones(())
        else:
            largest = (channels.largest if scale is None else channels.largest / scale).amax()
        return stored_input_scale(largest, activations)

    def scale_alone(self, targets: Sequence[Target], moments: StageMoments | None, place: Place | None) -> None:
        """Scales the columns of linears that share an input and stay float; arguments as of `solve`."""
        if place is None or moments is None or not moments.tokens:
            return
        plan = self._plan
        weights = [read_weight(plan.checkpoint, t, plan.source_of(t)).to(plan.device) for t in targets]
        scale = self._scaling.scale(targets, weights, Seen(None, moments.channels), place)
        if scale is not None:
            self._scaling.multiply(targets, scale)

    def solve_without_data(self, targets: Sequence[Target]) -> dict[str, QuantizedTensor]:
        """Quantizes linears by their weights alone."""
        results: dict[str, QuantizedTensor] = {}
        for members in self._run_as_one(targets):
            results |= self.solve(members, None)[0]
        return results

    def _run_as_one(self, targets: Sequence[Target]) -> list[list[Target]]:
        """Alone, but together where servers run linears as one and want one divisor of their FP8 scales."""
        if self._plan.default.scale != "e4m3":
            return [[target] for target in targets]
        shards = fused_shards(target.name for target in targets)
        owner = {name: fused for fused, names in shards.items() for name in names}
        groups: dict[str, list[Target]] = {}
        for target in targets:
            groups.setdefault(owner.get(target.name, target.name), []).append(target)
        return list(groups.values())

    def solve_embedding(self, target: Target) -> dict[str, QuantizedTensor]:
        """Quantizes an embedding without data, whatever rounds the linears: to the nearest, or as GGUF's files do."""
        weight = {target.name: read_weight(self._plan.checkpoint, target, target.disk).to(self._plan.device)}
        rounder = find("rtn" if target.scheme.block_type is None else "kquant")
        results, reports = solve_linears([target], weight, rounder, rounder.options(), None)
        self._reports += reports
        return results


def _statistics(moments: StageMoments) -> Statistics | None:
    if moments.train is None:
        return None
    held = moments.held_out if moments.held_out is not None and moments.held_out.tokens else None
    return Statistics(
        moments.train.matrix(),
        moments.train.tokens,
        held_out=held.matrix() if held else None,
        held_out_tokens=held.tokens if held else 0,
        cross=moments.train.cross(),
        held_out_cross=held.cross() if held else None,
    )
