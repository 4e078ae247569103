"""What a quantize run will do: algorithm, scheme of every linear, text, size, memory, time. `planning` decides it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from quantcli.algorithms import Algorithm, Step
from quantcli.formats.codec import Codec
from quantcli.formats.codecs import CODECS
from quantcli.formats.opening import Obstacle
from quantcli.formats.readers import DEFAULT_READERS
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.gathering import Gathering
from quantcli.models.gguf.planned import GgufPlan
from quantcli.models.layout import Layout
from quantcli.models.online import OnlineRotations
from quantcli.models.skeleton import disk_name
from quantcli.options import BUILTIN, SELF, CalibrationOptions, QuantizeOptions
from quantcli.pipelines.distilling.cost import DistillCost
from quantcli.pipelines.mixed_bits.budget import Budget, Choice
from quantcli.pipelines.planning.layout import activations
from quantcli.pipelines.planning.share import Share
from quantcli.pipelines.planning.target import Target
from quantcli.pipelines.rotation.train import TrainingCost
from quantcli.scheme import PER_CHANNEL, ActivationScheme, Scheme

__all__ = ["DTYPES", "MEASURED_TOKENS", "Plan", "is_trained"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MEASURED_TOKENS = 1024
"""On so many the sensitivity of the linears is measured where bits are mixed."""
_PIECE = 128
"""Tokens that the model writes in one go where its text only judges."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided beforehand."""

    folder: Path
    transforms: tuple[Step, ...]
    """What the float model goes through first."""
    algorithm: Algorithm
    """The rounder."""
    settings: Any
    options: QuantizeOptions
    """With the format that was chosen."""
    checkpoint: Checkpoint
    skeleton: Any
    layout: Layout
    default: Scheme
    targets: dict[str, Target]
    """By module path: block linears in order, then the head where it is quantized."""
    gguf: GgufPlan | None
    """What the file will hold, where that is a GGUF file."""
    opens: Mapping[str, Obstacle | None]
    """By reader, what keeps it from opening the result; None where nothing does."""
    scaled: dict[str, Target]
    """The same of the block linears whose inputs are scaled where none is quantized; their schemes are what scales are
    searched for."""
    embedding: Target | None
    untie_head: bool
    """Whether the head gets codes of its own although it shares the embedding's matrix."""
    source: str | None
    """self, builtin or data; None where no statistics are gathered."""
    device: torch.device
    dtype: torch.dtype
    """What blocks are run in."""
    keep_paused: bool
    size_bytes: int
    peak_bytes: int
    seconds: float
    model_digest: str
    share: Share | None = None
    """How much of the matrices is quantized; None where none is."""
    why_source: str = ""
    judges: int = 0
    """Rows of the model's own text that only judge."""
    online: OnlineRotations | None = None
    """Rotations that the result's weights expect at run time."""
    dequantized: str | None = None
    """What the input's weights are dequantized from as they are read, where they are."""
    budget: Budget | None = None
    """What may be spent, where bits are mixed."""
    choice: Choice | None = None
    """How it is spent, once that has been measured."""
    training: TrainingCost | None = None
    """What training rotations will take, where there are some to train."""
    trainer: Step | None = None
    """What trains scales once all is rounded."""
    distilling: DistillCost | None = None
    """What that will take."""

    @property
    def codec(self) -> Codec:
        """How linears are stored."""
        assert self.options.format is not None
        return CODECS[self.options.format]

    def float_dtype(self, stored: torch.dtype) -> torch.dtype:
        """What a float tensor of the input is written in."""
        return DTYPES.get(self.options.dtype or "", stored)

    @cached_property
    def replaced(self) -> frozenset[str]:
        """Names on disk of the tensors that codes take the place of."""
        return frozenset(t.disk for t in (*self.targets.values(), *([self.embedding] if self.embedding else [])))

    def block_targets(self, number: int) -> list[Target]:
        """The linears of one block that are quantized."""
        inside = self.layout.blocks[number] + "."
        return [target for target in self.targets.values() if target.name.startswith(inside)]

    @property
    def walked(self) -> dict[str, Target]:
        """The linears that calibration text is followed to, by module path."""
        return self.targets or self.scaled

    def walked_linears(self, number: int) -> list[Target]:
        """Those of one block."""
        inside = self.layout.blocks[number] + "."
        return [target for target in self.walked.values() if target.name.startswith(inside)]

    @property
    def gathering(self) -> Gathering:
        """What the walk gathers of each input."""
        step, counts = self.scaling, self.algorithm.sees == "outliers"
        rows = step.settings.rows if step is not None and step.algorithm.sees == "channels" else 0
        if not rows and self.activations is not None and self.activations.stored:
            rows = 1  # for the magnitudes beside them
        rounded = bool(self.targets) and not counts
        moments = rounded or (step is not None and not rows)
        return Gathering(moments, rows, self.settings.threshold if counts else None)

    @property
    def activations(self) -> ActivationScheme | None:
        """How what the linears read will be rounded."""
        return activations(self.options)

    def source_of(self, target: Target) -> str:
        """The tensor on disk that a target is read from: a tied head is the embedding's."""
        if target.disk in self.checkpoint.entries:
            return target.disk
        disk = disk_name(f"{self.layout.embedding}.weight", self.skeleton, self.checkpoint.entries)
        assert disk is not None
        return disk

    def float_dtype_of(self, target: Target) -> torch.dtype:
        """What a target would be written in if it stayed float."""
        return self.float_dtype(self.checkpoint.entries[self.source_of(target)].dtype)

    @property
    def judge_text(self) -> CalibrationOptions:
        """How the text that judges is written: in short pieces that fill rows; a step of writing reads all weights."""
        calibration = self.options.calibration
        pieces = calibration.seq_len // _PIECE if calibration.seq_len % _PIECE == 0 else 1
        return CalibrationOptions(
            SELF, num_samples=self.judges * pieces, seq_len=calibration.seq_len // pieces, seed=calibration.seed
        )

    @property
    def calibrates(self) -> bool:
        """Whether statistics are gathered."""
        return self.source is not None and self.gathers

    @property
    def gathers(self) -> bool:
        """Whether statistics would be, whatever text is chosen; kquant uses them only where text was named."""
        if not self.walked:
            return False
        used = [self.algorithm.calibration, *(s.algorithm.calibration for s in self.transforms if not is_trained(s))]
        if "required" in used or self.options.kv_cache is not None:
            return True
        if self.activations is not None and self.activations.stored:
            return True
        named = bool(self.options.calibration.data or self.options.calibration.data_name)
        return "optional" in used and named and self.options.preset != "fast"

    @property
    def wants_text(self) -> bool:
        """Whether text is read."""
        return self.trained is not None or self.trainer is not None or self.gathers

    @property
    def trained(self) -> Step | None:
        """The transform whose rotations are trained before blocks are quantized."""
        return next((step for step in self.transforms if is_trained(step)), None)

    @property
    def measured_text(self) -> CalibrationOptions:
        """The text on which sensitivities are measured where the algorithm itself reads none."""
        calibration = self.options.calibration
        given = calibration.data or (None if calibration.data_name else BUILTIN)
        return replace(calibration, data=given, num_samples=self.measured_rows)

    @property
    def measured_rows(self) -> int:
        """Rows of text on which sensitivities are measured."""
        rows = max(1, MEASURED_TOKENS // self.options.calibration.seq_len)
        return min(rows, self.options.calibration.num_samples)

    @property
    def improves(self) -> bool:
        """Whether codes and scales are changed after the solve: the steps that fit the wrong text hardest."""
        return bool(getattr(self.settings, "refit", False) or getattr(self.settings, "sweeps", 0))

    @property
    def holds_out(self) -> bool:
        """Whether some rows only judge."""
        searches = self.scaling is not None and getattr(self.scaling.settings, "searches", True)
        return self.calibrates and (self.improves or searches or self.options.correct_earlier)

    @property
    def scaling(self) -> Step | None:
        """The transform that works on each input."""
        return next((step for step in self.transforms if step.algorithm.scope == "stage"), None)

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        calibration = self.options.calibration
        text = "none"
        if self.source is not None:
            named = {"self": "text that the model writes itself", "builtin": "Python's documentation"}
            text = named.get(self.source or "", calibration.data or calibration.data_name or "")
            text += f", {calibration.num_samples} rows of {calibration.seq_len} tokens{self.why_source}"
            text += f"; {self.judges} rows of the model's own judge" if self.judges else ""
        rows = [
            ("model", f"{self.folder} ({type(self.skeleton).__name__}, {self.checkpoint.size_bytes / 1e6:.0f} MB)"),
            *([("source", f"{self.dequantized}, dequantized as it is read")] if self.dequantized else []),
            *(("transform", _words(step)) for step in self.transforms),
            *([("runs in", "quantcli only: rotations are computed at run time")] if self.online else []),
            *(self._rounding_rows() if self.targets else [("algorithm", "none: the result is a float model")]),
            ("calibration", text),
            *self._training_rows(),
            *([("then", _words(self.trainer))] if self.trainer is not None else []),
            ("device", f"{self.device}, {str(self.dtype).removeprefix('torch.')}"),
            ("estimated size", f"{self.size_bytes / 1e6:.0f} MB"),
            ("estimated peak memory", f"{self.peak_bytes / 1e9:.2f} GB"),
            ("estimated time", f"{self.seconds:.0f} s"),
        ]
        if self.options.simulation.simulates:
            rows.append(("evaluated with", self.options.simulation.describe()))
        return rows

    def _training_rows(self) -> list[tuple[str, str]]:
        if self.training is None:
            return []
        cost = self.training
        return [("training", f"about {cost.seconds:.0f} s and {cost.peak_bytes / 1e9:.2f} GB, the whole float model")]

    def _rounding_rows(self) -> list[tuple[str, str]]:
        scheme = self.default
        bits = str(scheme.bits) if self.budget is None else ", ".join(map(str, self.budget.widths))
        group = "one per row" if scheme.group_size == PER_CHANNEL else str(scheme.group_size)
        group += f" x {scheme.block_rows} rows" if scheme.block_rows > 1 else ""
        kind = scheme.codebook or ("sym" if scheme.symmetric else "asym")
        return [
            ("algorithm", _words(Step(self.algorithm, self.settings))),
            ("scheme", f"{bits} bits, group size {group}, {kind}"),
            *([("mixed bits", self._mixed_words(self.budget))] if self.budget is not None else []),
            *([("activations", self.activations.describe())] if self.activations is not None else []),
            *(
                [("cache", "FP8, one stored scale for each layer's keys and one for its values")]
                * bool(self.options.kv_cache)
            ),
            ("format", self.codec.name + (f", {self.options.gguf_type}" if self.gguf is not None else "")),
            ("opens in", self._opens_words()),
            ("linears", f"{len(self.targets)}{self._exceptions()}"),
            *(self.share.rows() if self.share is not None else []),
        ]

    def _opens_words(self) -> str:
        named = self.options.readers or DEFAULT_READERS
        able = [name for name, why in self.opens.items() if why is None]
        others = [f"{name} ({why.why})" for name in named if (why := self.opens[name]) is not None]
        return ", ".join(able) + (f"; not in {', '.join(others)}" if others else "")

    def _mixed_words(self, budget: Budget) -> str:
        text = "the calibration text"
        if self.source is None:
            text = self.measured_text.data or self.measured_text.data_name or ""
            text = {BUILTIN: "Python's documentation", SELF: "text that the model writes"}.get(text, text)
        return f"{budget.summary()}; which linear gets which is measured first, on {self.measured_rows} rows of {text}"

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "model": str(self.folder),
            "transforms": {step.algorithm.name: asdict(step.settings) for step in self.transforms},
            "algorithm": self.algorithm.name,
            "settings": asdict(self.settings),
            "scheme": self.default.to_dict(),
            "linears": len(self.targets),
            "share": None if self.share is None else self.share.to_dict(),
            "overridden": {t.name: t.scheme.to_dict() for t in self.targets.values() if t.scheme != self.default},
            "online_rotations": None if self.online is None else asdict(self.online),
            "mixed_bits": None if self.budget is None else self.budget.to_dict(self.choice),
            "opens_in": {name: why is None or why.why for name, why in self.opens.items()},
            "calibration": self.source,
            "device": str(self.device),
            "estimated_size_bytes": self.size_bytes,
            "estimated_peak_bytes": self.peak_bytes,
            "estimated_seconds": round(self.seconds, 1),
            "training": None if self.training is None else asdict(self.training),
            "trainer": None if self.trainer is None else {self.trainer.algorithm.name: asdict(self.trainer.settings)},
            "distilling": None if self.distilling is None else asdict(self.distilling),
        }

    def identity(self) -> dict[str, Any]:
        """What decides the written codes: a run resumes only what has the same."""
        options = asdict(self.options)
        for name in (
            "config",
            "readers",
            "output",
            "force",
            "dry_run",
            "evaluate",
            "simulation",
            "max_memory",
            "model",
            "graph",
            "allow_partial",
        ):
            options.pop(name)
        if self.trainer is not None:  # how it trains is noted with its state: what is rounded serves any training
            options |= self._without_trainer(options)
        return options | {"model_digest": self.model_digest, "source": self.source, "dtype_run": str(self.dtype)}

    def _without_trainer(self, options: dict[str, Any]) -> dict[str, Any]:
        """The entries of `options` that name the trainer, without it."""
        assert self.trainer is not None
        name, own = self.trainer.algorithm.name, {field.name for field in fields(self.trainer.settings)}

        def is_own(key: str) -> bool:
            owner, dot, plain = key.rpartition(".")
            return owner == name or (not dot and plain.replace("-", "_") in own)

        return {
            "settings": {key: text for key, text in options["settings"].items() if not is_own(key)},
            "trainer": name,
        }

    def _exceptions(self) -> str:
        other = sum(t.scheme != self.default for t in self.targets.values())
        left = len(self.layout.linears) - sum(name in self.targets for name in self.layout.linears)
        parts = [f"{other} with another scheme"] * bool(other) + [f"{left} left float"] * bool(left)
        return f" ({', '.join(parts)})" if parts else ""


def is_trained(step: Step) -> bool:
    """Whether a step's rotations are trained."""
    return step.algorithm.scope == "model" and step.algorithm.calibration == "required"


def _words(step: Step) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in asdict(step.settings).items())
    return step.algorithm.name + (f" ({settings})" if settings else "")
