"""`quantcli generate-adapter`: an ONNX base whose linears take LoRA as optional inputs, and adapter files for it."""

import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.adapters.files import FILE_FORMATS, write_adapter
from quantcli.adapters.lift import Lifted, has_lora, lift
from quantcli.adapters.peft_folder import LoraLayer, read_peft, refuse_adapter
from quantcli.adapters.slots import add_slots, fit
from quantcli.errors import InputError, UsageError
from quantcli.evaluate.genai_model import GenaiModel
from quantcli.evaluate.language_model import is_genai_folder
from quantcli.export.companions import probe_tokens, read_tokenizer
from quantcli.folder import (
    MANIFEST,
    Manifest,
    create_output,
    describe_parent,
    fingerprint,
    folder_size_bytes,
    public_options,
    read_manifest,
    write_json,
)
from quantcli.graphs.model.files import DATA_SUFFIX, open_graph, save_graph
from quantcli.json_files import as_type, read_json
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.readers import not_in_graphs
from quantcli.models.skeleton import has_experts
from quantcli.models.source import locate_model
from quantcli.models.unpack import write_float
from quantcli.options import CaptureOptions, GenerateAdapterOptions
from quantcli.pipelines import capture
from quantcli.progress import Progress, Silent

__all__ = ["AdapterFile", "GenerateAdapterResult", "run"]

_GRAPH = "model.onnx"
_FINETUNED = "adapter"
_PROBE_TOKENS = 48
_OTHER_ORDER = 1e-2  # int8 arithmetic (accuracy level 4) makes steps of rounding errors


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
    folder, given = _locate(options.model), _adapter_folders(options)
    is_graph = is_genai_folder(folder)
    built_in = is_graph and has_lora(open_graph(folder / _GRAPH))
    if built_in and _FINETUNED in given:
        raise UsageError(
            f"the adapter that {folder} has built in is named {_FINETUNED!r} already",
            hint="name the other: --adapter-path NAME=FOLDER",
        )
    if not given and not built_in:
        beside = Path(options.model).absolute().parent / _FINETUNED
        word = os.path.relpath(beside) if beside.is_dir() else "NAME=FOLDER"
        raise UsageError(f"{options.model} brings no adapter along", hint=f"add --adapter-path {word}")
    adapters, digest = {name: read_peft(path) for name, path in given.items()}, fingerprint(folder)
    for name, path in given.items():
        _warn_of_other_base(name, path, folder, digest, progress)
    progress.plan(
        "Generate adapter",
        [
            ("model", f"{options.model} ({'ONNX' if is_graph else 'captured first'})"),
            ("adapters", ", ".join([*([f"{_FINETUNED} (built in)"] if built_in else []), *adapters])),
            ("format", options.adapter_format),
            ("output", str(options.output)),
        ],
    )
    resolved = asdict(options) | {"output": str(options.output), "adapters": sorted(adapters)}
    inputs = [folder, *given.values()]
    with create_output(options.output, plan=resolved, inputs=inputs, force=options.force) as partial:
        base = folder
        if not is_graph:
            base = _capture(options, folder, partial.state / "captured", progress)
        files = _write(options, base, partial.model, adapters)
        progress.note("comparing the base with what it was")
        _verify(options, base, partial.model, [file.name for file in files], built_in)
        result = GenerateAdapterResult(
            output=options.output,
            adapters=files,
            size_bytes=folder_size_bytes(partial.model),
            seconds=round(time.perf_counter() - begin, 2),
        )
        metrics = {k: v for k, v in result.to_dict().items() if k != "output"}
        parent = describe_parent(folder, digest)
        partial.commit(Manifest("onnx", "generate-adapter", public_options(resolved), parent, metrics))
    return result


def _locate(model: str) -> Path:
    """The model folder.

    Raises:
        InputError: it is an adapter, or a graph without what says how to run it.
    """
    refuse_adapter(Path(model))
    folder = locate_model(model)
    if not is_genai_folder(folder) and not (folder / "config.json").is_file() and any(folder.glob("*.onnx")):
        raise InputError(
            f"{folder} holds an ONNX graph without genai_config.json, it cannot be run as a language model",
            hint="write it with `quantcli capture-onnx-graph`",
        )
    return folder


def _adapter_folders(options: GenerateAdapterOptions) -> dict[str, Path]:
    """Name to folder, as given or from beside the model of finetune's output."""
    named = options.named()
    if not named and (Path(options.model) / _FINETUNED).is_dir():
        named = {_FINETUNED: Path(options.model) / _FINETUNED}
    return named


def _warn_of_other_base(name: str, adapter: Path, folder: Path, digest: str, progress: Progress) -> None:
    """Says so where finetune trained the adapter beside another model than this, or than this graph was captured of."""
    home = adapter if (adapter / MANIFEST).is_file() else adapter.resolve().parent
    try:
        trained, made = read_manifest(home), read_manifest(folder)
    except InputError as error:
        progress.warn(f"{error.message}; whether adapter {name!r} belongs to {folder} is not checked")
        return
    if trained is None or trained.command != "finetune" or (made is not None and made.command == "generate-adapter"):
        return
    beside = home / "model"
    known = {trained.parent.get("fingerprint"), *([fingerprint(beside)] if beside.is_dir() else [])}
    ours = {digest, made.parent.get("fingerprint") if made is not None and made.kind == "onnx" else digest}
    if not known & ours:
        progress.warn(
            f"adapter {name!r} was trained beside {trained.parent.get('name')}, {folder} is another model or another "
            "quantization of it: the shapes fit, the answers may not"
        )


def _capture(options: GenerateAdapterOptions, folder: Path, target: Path, progress: Progress) -> Path:
    """The graph of a checkpoint.

    Raises:
        InputError: no graph of it takes adapters.
    """
    hint = "merge the adapter into the model, then quantize and capture that"
    checkpoint = Checkpoint.open(folder)
    if has_experts(checkpoint.config):
        raise InputError(f"{folder} is a mixture of experts, for which adapters cannot be generated", hint=hint)
    if (why := not_in_graphs(checkpoint)) is not None:
        progress.warn(
            f"its codes have no exact form in ONNX ({why}): the base is written in float32, with the values that they "
            "stand for; train beside weights of -a awq, gptq or kquant for a small one"
        )
        folder, packed = target.with_name("float"), folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_float(packed, folder)
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
    try:
        asked = CaptureOptions(str(folder), target, "genai", trust_remote_code=options.trust_remote_code)
        capture.run(asked, progress)
    except InputError as error:
        if "--exporter" not in (error.hint or ""):
            raise
        raise InputError(error.message, hint=hint) from error  # adapters need the builder's graph
    return target / "model"


def _write(
    options: GenerateAdapterOptions, base: Path, target: Path, adapters: Mapping[str, list[LoraLayer]]
) -> tuple[AdapterFile, ...]:
    """Writes the base with slots, its companions and the adapters."""
    model = open_graph(base / _GRAPH)
    lifted = lift(model) if has_lora(model) else None
    changed = {layer.module for layers in adapters.values() for layer in layers}
    slots = add_slots(model, changed if options.only_adapted else None)
    fitted = {name: fit(layers, slots) for name, layers in adapters.items()}
    save_graph(model, target / _GRAPH)
    for path in base.iterdir():
        if path.is_file() and path.name not in (_GRAPH, _GRAPH + DATA_SUFFIX):
            shutil.copyfile(path, target / path.name)
    _quieten(target / "genai_config.json")
    written = [_write_lifted(options, target, lifted)] if lifted is not None else []
    for name, values in fitted.items():
        ranks = {layer.a.shape[0] for layer in adapters[name]}
        written.append(_write_one(options, target, name, values, len(adapters[name]), ranks))
    return tuple(written)


def _write_lifted(options: GenerateAdapterOptions, target: Path, lifted: Lifted) -> AdapterFile:
    return _write_one(options, target, _FINETUNED, lifted.values, lifted.linears, lifted.ranks)


def _write_one(
    options: GenerateAdapterOptions,
    target: Path,
    name: str,
    values: Mapping[str, np.ndarray],
    linears: int,
    ranks: Collection[int],
) -> AdapterFile:
    file = target / (name + FILE_FORMATS[options.adapter_format])
    write_adapter(file, values, options.adapter_format)
    words = " to ".join(str(r) for r in dict.fromkeys((min(ranks), max(ranks))))
    return AdapterFile(name, file.name, linears, words, file.stat().st_size)


def _quieten(path: Path) -> None:
    """ONNX Runtime warns of every input that has a default, on stderr, each time that the folder is opened."""
    config = read_json(path, dict[str, dict[str, Any]], "a GenAI configuration")
    decoder = as_type(config.get("model", {}).get("decoder"), dict[str, Any], f"{path}: model.decoder cannot be read")
    settings = as_type(decoder.get("session_options") or {}, dict[str, Any], f"{path}: session_options cannot be read")
    config["model"]["decoder"] = decoder | {"session_options": settings | {"log_severity_level": 3}}
    write_json(path, config)


def _verify(options: GenerateAdapterOptions, base: Path, target: Path, names: Sequence[str], built_in: bool) -> None:
    """Runs what was written.

    Raises:
        InputError: an adapter makes logits that are not finite.
    """
    text, _ = probe_tokens(read_tokenizer(base, options.trust_remote_code))
    tokens = torch.tensor(text[:_PROBE_TOKENS])
    before, runs = _logits(base, tokens), options.adapter_format == "onnx_adapter"
    if not built_in and not np.array_equal(before, _logits(target, tokens)):
        raise AssertionError("the base with slots does not compute what it did without")
    for name in names if runs else ():
        found = _logits(target, tokens, name)
        if not np.isfinite(found).all():
            raise InputError(f"adapter {name!r} makes logits that are not finite")
        # constants are packed before they are multiplied by, inputs are not: the sums run in another order
        if built_in and name == _FINETUNED and np.abs(found - before).max() > _OTHER_ORDER * np.abs(before).max():
            raise AssertionError("the graph with its adapter as inputs does not compute what it did with constants")


def _logits(folder: Path, tokens: Tensor, adapter: str | None = None) -> np.ndarray:
    model = GenaiModel(folder, adapter)
    try:
        values: np.ndarray = model.logits(tokens[: model.max_positions - 1]).numpy()
        return values
    finally:
        model.close()
