"""Tries weight-only configurations on a graph until one is good enough, in the shape of Intel's `autotune`.

    from quantcli.onnx import config, tuning

    tune_config = tuning.TuningConfig(config_set=config.get_woq_tuning_config())
    best_model = tuning.autotune(
        model_input=model, tune_config=tune_config, eval_fn=eval_fn, calibration_data_reader=data_reader
    )

What is different: the best model is given back where none is good enough, and an `eval_fn` that fails or gives no
number is an error that names the configuration.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from quantcli.data.feeds import ReaderFeeds
from quantcli.errors import InputError, UsageError
from quantcli.onnx.config import BaseConfig, expand
from quantcli.onnx.quantizer import CalibrationDataReader
from quantcli.progress import Board, Progress, Silent

__all__ = ["TuningConfig", "autotune"]


@dataclass(frozen=True)
class TuningConfig:
    """What is tried, and when it is enough."""

    config_set: BaseConfig | Iterable[BaseConfig]
    """Configurations in their order; fields with lists are several."""
    timeout: float = 0
    """Seconds after which no further one is tried; 0: none."""
    max_trials: int = 100
    """Most that are tried."""
    tolerable_loss: float = 0.01
    """What the number of `eval_fn` may lose beside the float graph's, as a share of that."""

    def __post_init__(self) -> None:
        if self.max_trials < 1 or self.timeout < 0 or not math.isfinite(self.tolerable_loss):
            raise UsageError("max_trials is 1 or more, timeout 0 or more, tolerable_loss a number")


def autotune(
    model_input: onnx.ModelProto | str | Path,
    tune_config: TuningConfig,
    eval_fn: Callable[..., float],
    eval_args: tuple[Any, ...] | None = None,
    calibration_data_reader: CalibrationDataReader | None = None,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """Tries configurations in their order and stops at the first that is good enough.

    Args:
        model_input: The float graph; a file's JSON companions lie beside each graph that is judged.
        tune_config: What is tried, and when it is enough.
        eval_fn: Judges a graph, higher is better: called with the path of its file as text where `model_input` is one,
            else with a ModelProto.
        eval_args: Further arguments of it.
        calibration_data_reader: Gives calibration inputs; read once.
        progress: Told of every trial.

    Returns:
        The first graph that loses no more than `tolerable_loss`, else the best.

    Raises:
        UsageError: a configuration that cannot be; nothing is tried.
        InputError: the graph cannot be read, or `eval_fn` fails or gives no finite number.
    """
    configs = expand(tune_config.config_set)
    reader = None if calibration_data_reader is None else _Replay(ReaderFeeds.drain(calibration_data_reader))
    for config in configs:
        config.quantizer(model_input, reader)
    judge = _Judge(model_input, eval_fn, eval_args or ())
    baseline = judge(model_input, "the float graph")
    enough = baseline - tune_config.tolerable_loss * abs(baseline)
    progress, begun = progress or Silent(), time.monotonic()
    best: tuple[float, onnx.ModelProto] | None = None
    with progress.board(f"float: {baseline:.6g}, enough: {enough:.6g}", ("trial", "what", "score", "")) as board:
        for number, config in enumerate(configs[: tune_config.max_trials], 1):
            if best is not None and 0 < tune_config.timeout <= time.monotonic() - begun:
                break
            score, model = _try(config, model_input, reader, judge)
            if best is None or score > best[0]:
                best = score, model
            _tell(board, number, config, score, enough)
            if score >= enough:
                return model
    assert best is not None
    progress.warn(f"none of {len(configs)} configurations reaches {enough:.6g}, the best has {best[0]:.6g}")
    return best[1]


def _try(
    config: BaseConfig, model_input: Any, reader: "_Replay | None", judge: "_Judge"
) -> tuple[float, onnx.ModelProto]:
    quantizer = config.quantizer(model_input, reader)
    quantizer.process()
    model = quantizer.model.model
    if isinstance(model_input, onnx.ModelProto):
        return judge(model, str(config)), model
    path = Path(model_input)
    with TemporaryDirectory(prefix="quantcli-tune-") as folder:
        for companion in path.absolute().parent.glob("*.json"):
            shutil.copyfile(companion, Path(folder) / companion.name)
        written = Path(folder) / path.name
        # written from a copy: with data in a file of its own, the graph would point there
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        onnx.save(copy, written, save_as_external_data=True, location=f"{path.name}.data")
        return judge(str(written), str(config)), model


def _tell(board: Board, number: int, config: BaseConfig, score: float, enough: float) -> None:
    board.add((str(number), str(config), f"{score:.6g}", "good enough" if score >= enough else ""))


class _Judge:
    """The user's function, whose faults are named."""

    def __init__(self, model: Any, function: Callable[..., float], arguments: tuple[Any, ...]):
        if not callable(function):
            raise UsageError(f"eval_fn is {type(function).__name__}, expected a function")
        self._as_path = not isinstance(model, onnx.ModelProto)
        self._function, self._arguments = function, arguments

    def __call__(self, model: Any, what: str) -> float:
        try:
            found = self._function(str(model) if self._as_path else model, *self._arguments)
        except Exception as error:
            raise InputError(f"eval_fn failed on {what}: {type(error).__name__}: {error}") from error
        try:
            score = float(found)
        except (TypeError, ValueError) as error:
            raise InputError(f"eval_fn gave {type(found).__name__} for {what}, expected a number") from error
        if not math.isfinite(score):
            raise InputError(f"eval_fn gave {score} for {what}, expected a finite number")
        return score


class _Replay:
    """A reader that begins anew whenever it is copied, as quantizers do."""

    def __init__(self, feeds: ReaderFeeds):
        self._feeds, self._rest = feeds, iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._rest, None)

    def __deepcopy__(self, memo: Any) -> "_Replay":
        return _Replay(self._feeds)
