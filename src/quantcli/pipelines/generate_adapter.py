"""`quantcli generate-adapter`: an ONNX base whose linears take LoRA as optional inputs, and adapter files for it."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.adapters.files import FILE_FORMATS, write_adapter
from quantcli.adapters.peft_folder import LoraLayer, read_peft
from quantcli.adapters.slots import add_slots, fit
from quantcli.errors import InputError, UsageError
from quantcli.evaluate.genai_model import GenaiModel
from quantcli.evaluate.language_model import is_genai_folder
from quantcli.export.companions import probe_tokens, read_tokenizer
from quantcli.folder import (
    Manifest,
    create_output,
    describe_parent,
    fingerprint,
    folder_size_bytes,
    public_options,
    write_json,
)
from quantcli.graphs.files import DATA_SUFFIX, open_graph, save_graph
from quantcli.models.source import locate_model
from quantcli.options import CaptureOptions, GenerateAdapterOptions
from quantcli.pipelines import capture
from quantcli.progress import Progress, Silent

__all__ = ["AdapterFile", "GenerateAdapterResult", "run"]

_GRAPH = "model.onnx"
_FINETUNED = "adapter"
_PROBE_TOKENS = 48


@dataclass(frozen=True)
class AdapterFile:
    """One adapter as it was written."""

    name: str
    """What it is loaded by."""
    file: str
    """Its file in the model folder."""
    linears: int
    """Linears that it changes."""
    ranks: str
    """Their rank, or the lowest and highest."""
    size_bytes: int
    """Bytes of the file."""


@dataclass(frozen=True)
class GenerateAdapterResult:
    """What `run` wrote."""

    output: Path
    """The folder."""
    adapters: tuple[AdapterFile, ...]
    """Its adapters."""
    size_bytes: int
    """Bytes of its model, adapters included."""
    seconds: float
    """How long it took."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self) | {"output": str(self.output)}


def run(options: GenerateAdapterOptions, progress: Progress | None = None) -> GenerateAdapterResult:
    """Makes the base and its adapters, and checks that without an adapter the base is what it was, bit for bit.

    Raises:
        UsageError: no adapter, or names that cannot be.
        InputError: a model or adapter that cannot be read, or that do not belong together.
        ResourceError: not enough disk.
    """
    progress, begin = progress or Silent(), time.perf_counter()
    folder = locate_model(options.model)
    adapters = {name: read_peft(path) for name, path in _adapter_folders(options).items()}
    resolved = asdict(options) | {"output": str(options.output), "adapters": sorted(adapters)}
    with create_output(options.output, plan=resolved, inputs=[folder], force=options.force) as partial:
        base = folder
        if not is_genai_folder(folder):
            captured = partial.state / "captured"
            capture.run(CaptureOptions(str(folder), captured, trust_remote_code=options.trust_remote_code), progress)
            base = captured / "model"
        files = _write(options, base, partial.model, adapters)
        progress.note("comparing the base without adapter with what it was")
        _verify(options, base, partial.model, adapters)
        result = GenerateAdapterResult(
            output=options.output,
            adapters=files,
            size_bytes=folder_size_bytes(partial.model),
            seconds=round(time.perf_counter() - begin, 2),
        )
        metrics = {k: v for k, v in result.to_dict().items() if k != "output"}
        parent = describe_parent(folder, fingerprint(folder))
        partial.commit(Manifest("onnx", "generate-adapter", public_options(resolved), parent, metrics))
    return result


def _adapter_folders(options: GenerateAdapterOptions) -> dict[str, Path]:
    """Name to folder, as given or from beside the model of finetune's output."""
    named = options.named()
    if not named and (Path(options.model) / _FINETUNED).is_dir():
        named = {_FINETUNED: Path(options.model) / _FINETUNED}
    if not named:
        raise UsageError(f"{options.model} brings no adapter along", hint="add --adapter-path NAME=FOLDER")
    return named


def _write(
    options: GenerateAdapterOptions, base: Path, target: Path, adapters: Mapping[str, list[LoraLayer]]
) -> tuple[AdapterFile, ...]:
    """Writes the base with slots, its companions and the adapters."""
    model = open_graph(base / _GRAPH)
    slots = add_slots(model)
    fitted = {name: fit(layers, slots) for name, layers in adapters.items()}
    save_graph(model, target / _GRAPH)
    for path in base.iterdir():
        if path.is_file() and path.name not in (_GRAPH, _GRAPH + DATA_SUFFIX):
            shutil.copyfile(path, target / path.name)
    _quieten(target / "genai_config.json")
    written = []
    for name, values in fitted.items():
        file = target / (name + FILE_FORMATS[options.adapter_format])
        write_adapter(file, values, options.adapter_format)
        ranks = sorted({layer.a.shape[0] for layer in adapters[name]})
        words = " to ".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))
        written.append(AdapterFile(name, file.name, len(adapters[name]), words, file.stat().st_size))
    return tuple(written)


def _quieten(path: Path) -> None:
    """ONNX Runtime warns of every input that has a default, on stderr, each time that the folder is opened."""
    config = json.loads(path.read_text())
    config["model"]["decoder"].setdefault("session_options", {})["log_severity_level"] = 3
    write_json(path, config)


def _verify(options: GenerateAdapterOptions, base: Path, target: Path, adapters: Mapping[str, list[LoraLayer]]) -> None:
    """Runs what was written.

    Raises:
        InputError: an adapter makes logits that are not finite.
    """
    text, _ = probe_tokens(read_tokenizer(base, options.trust_remote_code))
    tokens = torch.tensor(text[:_PROBE_TOKENS])
    plain = _logits(base, tokens)
    if not np.array_equal(plain, _logits(target, tokens)):
        raise AssertionError("the base with slots does not compute what it did without")
    if options.adapter_format != "onnx_adapter":
        return
    for name in adapters:
        if not np.isfinite(_logits(target, tokens, name)).all():
            raise InputError(f"adapter {name!r} makes logits that are not finite")


def _logits(folder: Path, tokens: Tensor, adapter: str | None = None) -> np.ndarray:
    model = GenaiModel(folder, adapter)
    try:
        values: np.ndarray = model.logits(tokens[: model.max_positions - 1]).numpy()
        return values
    finally:
        model.close()
