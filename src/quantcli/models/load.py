"""Opens a checkpoint folder as a transformers model that runs: float or quantized, ours or others'.

`models.readers` lists the formats. Quantized linears stay packed (`models.linear`); no package beside torch and
transformers takes part.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from quantcli.errors import InputError, UsageError, first_line
from quantcli.folder import resolve_model_folder
from quantcli.formats import compressed_config
from quantcli.models.attention import round_cache
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.conversion import ModelTensors, as_in_model
from quantcli.models.dequantized import MXFP4, as_float
from quantcli.models.gguf.checkpoint import GgufCheckpoint
from quantcli.models.layout import Layout, find_layout, is_linear, weight_shape
from quantcli.models.linear import PackedEmbedding, QuantizedLinear, RowLookup
from quantcli.models.machine import pick_device
from quantcli.models.online import OnlineRotations, rotate_inputs
from quantcli.models.opened import open_checkpoint
from quantcli.models.readers import packed_names, read_packed, reader_of
from quantcli.models.simulate import simulate
from quantcli.models.skeleton import build_skeleton, first_names, load_config
from quantcli.options import SimulationOptions
from quantcli.tensors.activations import InputRounding

__all__ = ["load", "no_progress_bar", "read_packed", "refuse_missing"]

Model: TypeAlias = Any  # transformers' PreTrainedModel; its stubs are not followed


def load(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    cache_weights: bool = False,
    simulation: SimulationOptions | None = None,
) -> Model:
    """Opens a model for inference.

    Args:
        folder: Checkpoint folder, or an output folder X of ours that holds X/model.
        device: cpu, cuda or cuda:N; default: cuda where there is one.
        dtype: Type of the tensors that are not packed and of the activations; default: float32 on CPU (half precision
            products are slow there), else the checkpoint's.
        trust_remote_code: Run model code that the folder brings along.
        cache_weights: Keep dequantized weights after their first use: faster over long inputs, at the memory of a
            float model.
        simulation: Activations and cache to round as the model runs; see `models.simulate`.

    Returns:
        A transformers model in evaluation mode, usable with `generate`.

    Raises:
        InputError: the folder is no model that we can read, or damaged, or a tensor holds NaN or infinity.
        UsageError: there is no such device or dtype, or the simulation does not fit the model.
    """
    path = resolve_model_folder(Path(folder))
    checkpoint = open_checkpoint(path)
    checkpoint.require_finite()
    place = pick_device(None if device is None else str(device))
    kind = _choose_dtype(dtype, checkpoint.config, place)
    online = OnlineRotations.of(checkpoint.config)
    simulates = simulation is not None and simulation.simulates
    whole = not isinstance(checkpoint, GgufCheckpoint) and checkpoint.config.get("quantization_config") is None
    if (checkpoint.config.get("quantization_config") or {}).get("quant_method") == MXFP4:
        checkpoint = as_float(checkpoint)
    if whole and online is None and not simulates:
        return _load_float(path, kind, trust_remote_code).to(place).eval()
    model, layout = _load_piecewise(checkpoint, place, kind, trust_remote_code, cache_weights)
    model.eval()
    if online is not None:
        rotate_inputs(model, layout.linears, online)
    if simulation is not None and simulates:
        _refuse_rounded(model, checkpoint, simulation)
        simulate(model, layout, simulation, online)
    return model


def _refuse_rounded(model: Model, checkpoint: Checkpoint, simulation: SimulationOptions) -> None:
    """Nothing is rounded twice."""
    inputs = any(isinstance(m, QuantizedLinear) and m.rounding is not None for m in model.modules())
    if simulation.a_bits < 16 and inputs:
        raise UsageError(f"{checkpoint.folder} rounds activations by itself", hint="leave --a-bits out")
    cache = (checkpoint.config.get("quantization_config") or {}).get("kv_cache_scheme")
    if min(simulation.k_bits, simulation.v_bits) < 16 and cache:
        raise UsageError(f"{checkpoint.folder} rounds its cache by itself", hint="leave --k-bits and --v-bits out")


def _choose_dtype(dtype: str | torch.dtype | None, config: Mapping[str, Any], device: torch.device) -> torch.dtype:
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        nested = config.get("text_config") or {}
        dtype = next((c[k] for c in (config, nested) for k in ("dtype", "torch_dtype") if c.get(k)), "float32")
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"unknown dtype {dtype!r}: float32, float16 or bfloat16 is allowed")
    return found


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turns what transformers raises on a folder it cannot open into an error that names the folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{folder} needs the model code that it brings along", hint="add --trust-remote-code if you trust it"
            ) from error
        raise InputError(f"{folder} cannot be opened by transformers: {first_line(error)}") from error


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """A library says nothing on its own; transformers would draw on stderr."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_float(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Model:
    config = load_config(folder, trust_remote_code)
    with _explained(folder), no_progress_bar():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    refuse_missing(folder, info["missing_keys"])
    return model


def _load_piecewise(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, trust_remote_code: bool, cache: bool
) -> tuple[Model, Layout]:
    """Tensor by tensor into a skeleton, whose experts stand apart; the model and its parts."""
    packed: list[str] = []
    if checkpoint.config.get("quantization_config") is not None:
        reader = reader_of(checkpoint)
        packed = packed_names(checkpoint, reader)
        if not packed:
            ends = " or ".join(f".{mark}" for mark in reader.marks)
            raise InputError(f"{checkpoint.folder}: quantization_config is there, but no tensor ends in {ends}")
    model = _skeleton(checkpoint, packed, trust_remote_code)
    layout = find_layout(model)
    tensors = as_in_model(_with_weights(checkpoint, packed, reader.parts if packed else ()), model)
    _refuse_unknown(checkpoint.folder, tensors.unknown, packed, reader.marks[0] if packed else "")
    placed = {disk: name for name, disk in reversed(tensors.names.items())}
    for name in packed:
        target = placed.get(f"{name}.weight")
        if target is None:
            raise InputError(f"{checkpoint.folder}: {name} is packed, the model makes other matrices of it")
        layer = read_packed(checkpoint, name, cache=cache).to(device)
        _replace(model, target.removesuffix(".weight"), layer, dtype, f"{checkpoint.folder}: {name}")
    done = {f"{name}.{part}" for name in packed for part in ("weight", "bias")}
    _fill(model, tensors, done, device, dtype)
    _tie(model)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    refuse_missing(checkpoint.folder, left)
    if (checkpoint.folder / "generation_config.json").is_file():
        with _explained(checkpoint.folder):
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    model = model.to(device)
    _round_cache(model, layout, checkpoint, placed)
    return model, layout


def _round_cache(model: Model, layout: Layout, checkpoint: Checkpoint, placed: Mapping[str, str]) -> None:
    """Rounds keys and values where the checkpoint says so; `placed` has the model's names by those on disk."""
    scheme = compressed_config.cache_scheme_of(checkpoint.config.get("quantization_config") or {})
    if scheme is None:
        return
    found: dict[str, dict[str, InputRounding]] = {}
    for name in checkpoint.entries:
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("k_scale", "v_scale"):
            continue
        tensor = checkpoint.read(name)
        inside = next(((disk, path) for disk, path in placed.items() if disk.startswith(f"{stem}.")), None)
        if inside is None or tensor.numel() != 1:
            raise InputError(f"{checkpoint.folder}: unexpected tensor {name} of shape {list(tensor.shape)}")
        path = inside[1].removesuffix(inside[0].removeprefix(stem))
        found.setdefault(path, {})[leaf] = InputRounding(scheme, tensor.reshape(1).float())
    if len(found) != len(layout.blocks) or any(len(pair) != 2 for pair in found.values()):
        raise InputError(
            f"{checkpoint.folder} says that its cache is rounded, and has scales for {len(found)} of "
            f"{len(layout.blocks)} blocks"
        )
    round_cache(model, layout, {path: (pair["k_scale"], pair["v_scale"]) for path, pair in found.items()})


def _skeleton(checkpoint: Checkpoint, packed: list[str], trust_remote_code: bool) -> Model:
    """The model without weights, its head untied where the checkpoint brings one of its own."""
    if isinstance(checkpoint, GgufCheckpoint):
        config = checkpoint.model_config()
    else:
        config = load_config(checkpoint.folder, trust_remote_code)
    # a head of its own stands at the top level: lm_head, embed_out
    if any("." not in name for name in packed):
        config.tie_word_embeddings = False
    elif (checkpoint.config.get("quantization_config") or {}).get(
        "tie_word_embeddings"
    ):  # Olive says it there, and only there
        config.tie_word_embeddings = True
    return build_skeleton(checkpoint.folder, config, trust_remote_code)


def _with_weights(checkpoint: Checkpoint, packed: list[str], parts: Iterable[str]) -> Checkpoint:
    """The checkpoint as if every packed matrix were a weight: what transformers' tables of names know."""
    written = {f"{name}.{part}" for name in packed for part in parts}
    entries = {
        name: entry
        for name, entry in checkpoint.entries.items()
        if name not in written and not (packed and compressed_config.is_cache_scale(name))
    }
    for name in packed:
        any_part = next(checkpoint.entries[f"{name}.{part}"] for part in parts if f"{name}.{part}" in checkpoint)
        entries[f"{name}.weight"] = any_part
    return checkpoint.with_entries(entries)


def _refuse_unknown(folder: Path, unknown: list[str], packed: list[str], mark: str) -> None:
    """Refuses tensors that the model has no place for."""
    stems = {f"{name}.weight" for name in packed}
    for name in unknown:
        if name in stems:
            stem = name.removesuffix(".weight")
            raise InputError(f"{folder}: unexpected tensor {stem}.{mark}, the model has no module {stem}")
    if unknown:
        raise InputError(f"{folder}: unexpected tensor {first_names(unknown)}, the model has no such weight")


def _replace(model: Model, name: str, layer: QuantizedLinear, dtype: torch.dtype, where: str) -> None:
    """Puts a packed layer where the skeleton has a float one of the same shape."""
    old = model.get_submodule(name)
    shape = layer.out_features, layer.in_features
    if not (is_linear(old) or isinstance(old, nn.Embedding)):
        raise InputError(f"{where} is packed, the model has a {type(old).__name__} there")
    expected = weight_shape(old)
    if shape != expected:
        raise InputError(f"{where} holds {list(shape)} weights, the model expects {list(expected)}")
    new: nn.Module = layer
    if isinstance(old, nn.Embedding):
        if not isinstance(layer, RowLookup):
            raise InputError(f"{where} is an embedding on a codebook, which is not read")
        new = PackedEmbedding(layer, dtype=dtype, embed_scale=getattr(old, "embed_scale", None))
    else:
        wants_bias = old.bias is not None
        if wants_bias != (layer.bias is not None):
            raise InputError(f"{where}.bias is {'missing' if wants_bias else 'unexpected'}")
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(dtype)
    model.set_submodule(name, new)


def _fill(model: Model, tensors: ModelTensors, done: set[str], device: torch.device, dtype: torch.dtype) -> None:
    """Reads the tensors that are not packed into the skeleton."""
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, disk in tensors.names.items():
        if disk in done or tensors.names.get(tied.get(name, "")) == disk:
            continue
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        old = getattr(module, leaf)
        entry = tensors.entries[disk]
        if disk not in tensors.origins and tuple(old.shape) != entry.shape:
            raise InputError(
                f"{tensors.folder}: tensor {disk} has shape {list(entry.shape)}, the model expects {list(old.shape)}"
            )
        tensor = tensors.read(disk)
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if _stays_float32(model, name) else dtype)
        tensor = tensor.to(device)
        if isinstance(old, nn.Parameter):
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        else:
            setattr(module, leaf, tensor)


def _stays_float32(model: Model, name: str) -> bool:
    """Whether the model class insists on float32 for this tensor (some routers and norms)."""
    patterns = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(re.search(rf"(^|\.){re.escape(p)}(\.|$)", name) for p in patterns)


def _tie(model: Model) -> None:
    """Gives what shares another's matrix and has none of its own the one that was read."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        to, _, leaf = target.rpartition(".")
        giver_path, _, given = source.rpartition(".")
        if (
            isinstance(model.get_submodule(to), QuantizedLinear | PackedEmbedding)
            or not (old := getattr(model.get_submodule(to), leaf)).is_meta
        ):
            continue
        giver = model.get_submodule(giver_path)
        if isinstance(giver, PackedEmbedding):
            model.set_submodule(to, giver.packed)
        elif isinstance(giver, QuantizedLinear):
            model.set_submodule(to, giver)
        elif old is not None:
            setattr(model.get_submodule(to), leaf, getattr(giver, given))


def refuse_missing(folder: Path, names: Any) -> None:
    """Refuses a checkpoint without the tensors of these names."""
    missing = sorted(names)
    if missing:
        raise InputError(f"{folder} lacks tensor {first_names(missing)} that the model needs")
