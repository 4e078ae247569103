"""What an evaluation or a generation needs from a model, whatever runs it."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantcli.errors import InputError, UsageError
from quantcli.evaluate.sampling import Sampling
from quantcli.options import SimulationOptions

__all__ = ["LanguageModel", "is_genai_folder", "open_language_model"]


class LanguageModel(Protocol):
    """A causal language model that scores text and continues it."""

    @property
    def max_positions(self) -> int | None:
        """Longest input, where the folder says so."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer, where the folder says so."""
        ...

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores text: tokens [T] int64 to [T, V] float32 on CPU; row t predicts token t + 1."""
        ...

    def start(self, tokens: Tensor, room: int, sampling: Sampling | None = None) -> None:
        """Reads a prompt, tokens [T] int64, with room for so many more; ends an earlier continuation.

        Without `sampling` every step takes the likeliest token.
        """
        ...

    def step(self) -> int:
        """Appends a token; the model runs on it at the next step."""
        ...

    def keep_float_weights(self) -> None:
        """Trades memory for speed over long inputs from now on, where that is possible."""
        ...

    def close(self) -> None:
        """Drops the model's memory."""
        ...


def is_genai_folder(folder: Path) -> bool:
    """Whether this is an ONNX Runtime GenAI folder."""
    return (folder / "genai_config.json").is_file()


def open_language_model(
    folder: Path,
    device: str | torch.device | None,
    trust_remote_code: bool,
    simulation: SimulationOptions | None = None,
    adapter: str | None = None,
) -> LanguageModel:
    """Opens a model folder with what runs it.

    Raises:
        InputError: the folder is neither a checkpoint nor an ONNX GenAI folder, or the adapter does not fit it.
        UsageError: activations are to be rounded in a graph, or there is no such adapter.
    """
    if is_genai_folder(folder):
        if simulation is not None and simulation.simulates:
            raise UsageError(
                f"{folder} holds an ONNX graph: quantized activations and caches are simulated in checkpoints only",
                hint="give the checkpoint that it was captured from",
            )
        from quantcli.evaluate.genai_model import GenaiModel

        return GenaiModel(folder, adapter)
    if not (folder / "config.json").is_file() and any(folder.glob("*.onnx")):
        raise InputError(
            f"{folder} holds an ONNX graph without genai_config.json, it cannot be run as a language model",
            hint="write it with `quantcli capture-onnx-graph`",
        )
    from quantcli.evaluate.torch_model import TorchModel

    return TorchModel(
        folder, device, trust_remote_code, simulation, None if adapter is None else _adapter_folder(folder, adapter)
    )


def _adapter_folder(folder: Path, adapter: str) -> Path:
    """An adapter folder of peft: given by path, or by its name beside the model, where finetune writes it."""
    for path in (Path(adapter), folder.parent / adapter):
        if path.is_dir():
            return path
    if Path(adapter).is_file():
        raise UsageError(
            f"--adapter {adapter} is a file; {folder} is a checkpoint, which takes the folder that peft saved",
            hint="files of adapters belong to ONNX bases, see `quantcli generate-adapter`",
        )
    raise UsageError(f"--adapter {adapter}: there is no such folder", hint="give a folder that peft saved")
