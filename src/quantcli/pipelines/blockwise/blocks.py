"""Calibrated blocks: each is read, its stages are solved as the streams come through, and it is forgotten."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor

from quantcli.errors import InputError, first_line
from quantcli.formats.compressed_config import FP8_CACHE
from quantcli.models.attention import CacheRanges
from quantcli.models.block import BlockCall, block_stages
from quantcli.models.experts import show_all_tokens
from quantcli.models.folds import Fold, find_folds
from quantcli.models.gathering import StageMoments
from quantcli.models.layout import head_size
from quantcli.models.machine import Heap
from quantcli.models.paused import Pause, Shelf, study_pauses
from quantcli.models.skeleton import disk_stem
from quantcli.models.walk import run_block
from quantcli.pipelines.blockwise.loading import load_block
from quantcli.pipelines.blockwise.scaling import Place
from quantcli.pipelines.blockwise.stages import StageSolver
from quantcli.pipelines.blockwise.streams import Streams
from quantcli.pipelines.planning.plan import Plan
from quantcli.tensors.activations import stored_input_scale
from quantcli.tensors.grids import divides_rows
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["CalibratedBlocks"]


class CalibratedBlocks:
    """Quantizes blocks in order; what is learned of one serves those that are built alike."""

    def __init__(self, plan: Plan, streams: Streams, solver: StageSolver, heap: Heap):
        """No block is read yet.

        Args:
            plan: What runs.
            streams: Hidden states in front of the first block; each block moves them on.
            solver: Of the stages.
            heap: Gives memory back while a block runs.
        """
        self._plan, self._streams, self._solver, self._heap = plan, streams, solver, heap
        self._pauses: dict[tuple[Any, ...], dict[int, Pause]] = {}
        self._folds: dict[tuple[Any, ...], dict[str, Fold]] = {}
        self._ranges = CacheRanges(plan.skeleton) if plan.options.kv_cache is not None else None
        self._cache_scales: dict[str, Tensor] = {}
        self.undivided: set[str] = set()
        """Linears whose outputs were not scaled, since their scales cannot be divided."""
        self._shelf = Shelf(len(streams.hidden) * (2 if plan.options.correct_earlier else 1))

    @property
    def scales_nothing(self) -> bool:
        """Whether blocks were looked at, and none has an input that can be scaled."""
        return bool(self._folds) and not any(self._folds.values())

    def take_cache_scales(self) -> dict[str, Tensor]:
        """Scales of keys and values of the blocks that have run since it was last asked, by name on disk."""
        found, self._cache_scales = self._cache_scales, {}
        return found

    def _divides(self, path: str, fold: Fold, results: dict[str, QuantizedTensor]) -> bool:
        """Whether what makes an input can be divided; codes whose scales cannot would have to be rounded anew."""
        producer = results.get(f"{path}.{fold.producer}")
        if producer is None or divides_rows(producer.scheme):
            return True
        self.undivided.add(fold.producer)
        return False

    def quantize(self, number: int) -> dict[str, QuantizedTensor]:
        """Quantizes one block, by module path; the streams are behind it afterwards.

        Where no linear is to be quantized, scales alone are found: the function stays, so the streams go on through
        the weights as they were.
        """
        plan, streams = self._plan, self._streams
        path = plan.layout.blocks[number]
        block = load_block(plan, number)
        reference = deepcopy(block) if plan.options.correct_earlier else None
        if plan.options.calibration.moe_calibration == "all":
            show_all_tokens(block)
            if reference is not None:
                show_all_tokens(reference)
        linears = [t.name.removeprefix(path + ".") for t in plan.walked_linears(number)]
        calls = [found[number] for found in streams.calls]
        first = streams.hidden[0]
        try:
            stages = block_stages(block, linears, first, calls[0])
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # what a class says when called apart
            raise InputError(
                f"{path} of {type(plan.skeleton).__name__} cannot be run by itself: {first_line(error)}",
                hint="use an algorithm that needs no text: -a rtn, kquant or hqq",
            ) from error
        built = tuple((name, type(module)) for name, module in block.named_modules())
        kind = (built, *map(tuple, stages))
        if kind not in self._pauses:
            self._pauses[kind] = study_pauses(block, stages, first, calls[0])
            if plan.scaling is not None:
                head_dim = head_size(plan.skeleton)
                self._folds[kind] = find_folds(block, stages, first, calls[0], head_dim)
        folds = self._folds.get(kind, {})
        results: dict[str, QuantizedTensor] = {}

        def solve(names: list[str], moments: StageMoments | None) -> None:
            targets = [plan.walked[f"{path}.{name}"] for name in names]
            fold = folds.get(names[0])
            place = Place(path, fold, results) if fold is not None and self._divides(path, fold, results) else None
            if not plan.targets:
                self._solver.scale_alone(targets, moments, place)
                return
            solved, scale = self._solver.solve(targets, moments, place)
            for target, tensor in solved.items():
                results[target] = tensor
                module = block.get_submodule(target.removeprefix(path + "."))
                weight = tensor.dequantize().to(module.weight.device)
                weight = (weight if scale is None else weight / scale).to(module.weight.dtype)
                module.weight.data.copy_(weight.T if plan.targets[target].transposed else weight)

        with self._watched(block, path):
            self._run(number, block, stages, calls, kind, solve, reference)
        return results

    def _run(
        self,
        number: int,
        block: Any,
        stages: list[list[str]],
        calls: Sequence[BlockCall],
        kind: tuple[Any, ...],
        solve: Callable[[list[str], StageMoments | None], None],
        reference: Any,
    ) -> None:
        plan, streams = self._plan, self._streams
        run_block(
            block,
            streams.hidden,
            calls,
            stages,
            solve,
            gathering=plan.gathering,
            held_out=streams.held_out,
            keep=plan.keep_paused,
            pauses=self._pauses[kind],
            shelf=self._shelf,
            between=self._heap.watch,
            reference=reference,
            reference_inputs=streams.float_hidden,
            path=plan.layout.blocks[number],
        )

    @contextmanager
    def _watched(self, block: Any, path: str) -> Iterator[None]:
        """While a block runs, looks at its keys and values where scales of them are stored."""
        plan = self._plan
        if self._ranges is None:
            yield
            return
        with self._ranges.of_block(block) as found:
            yield
        if not found:
            raise InputError(
                f"{path} computes attention in a way of its own: its keys and values cannot be measured",
                hint="leave --kv-cache out",
            )
        for name, tops in found.items():
            stem = disk_stem(f"{path}.{name}", plan.skeleton, plan.checkpoint.entries)
            for kind, top in zip(("k_scale", "v_scale"), tops, strict=True):
                self._cache_scales[f"{stem}.{kind}"] = stored_input_scale(top, FP8_CACHE).cpu()
