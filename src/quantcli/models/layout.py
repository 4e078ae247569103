"""Where a language model keeps its blocks, embedding, final norm and head: facts per model type, and a fallback.

A new family is one line in `FAMILIES`; a model that is not listed is looked at: its blocks are the list of modules with
linears that stands nearest to the embedding.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantcli.errors import InputError

__all__ = [
    "FAMILIES",
    "Family",
    "Layout",
    "config_value",
    "find_layout",
    "head_size",
    "is_linear",
    "is_transposed",
    "position_count",
    "weight_shape",
]


@dataclass(frozen=True)
class Family:
    """What cannot be seen in a model's modules."""

    blocks: str
    """Path of the list of blocks."""
    final_norm: str
    """Path of the norm between the last block and the head."""
    keep_float: tuple[str, ...] = ()
    """Ends of names of linears that are routers or gates, not weights worth quantizing."""


_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
_OFFSET = 4  # some tables have a few rows more, for padding
_LLAMA = Family("model.layers", "model.norm")
_GPT2 = Family("transformer.h", "transformer.ln_f")
_SHARED_GATE = ("shared_expert_gate",)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": _LLAMA,
    "gpt2": _GPT2,
    "falcon": _GPT2,
    "gpt_neox": Family("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "opt": Family("model.decoder.layers", "model.decoder.final_layer_norm"),
    "mixtral": _LLAMA,
    "qwen2_moe": Family("model.layers", "model.norm", _SHARED_GATE),
    "qwen3_moe": _LLAMA,
}
_GATES = ("router", "gate", *_SHARED_GATE)  # in a family that nobody has described


@dataclass(frozen=True)
class Layout:
    """The parts of one model, as module paths."""

    blocks: tuple[str, ...]
    """Path of each block, in order."""
    linears: tuple[str, ...]
    """Paths of the linears inside blocks that may be quantized, in order of registration."""
    embedding: str
    """Path of the input embedding."""
    head: str | None
    """Path of the output head."""
    tied: bool
    """Whether the head is the embedding's matrix."""
    final_norm: str | None
    """Path of the norm before the head, where known."""
    known: bool
    """Whether the family is in the table."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one stored matrix, and does nothing else."""
    kind: Any = type(module)
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and _computes_linear(kind))


@cache
def _computes_linear(kind: Any) -> bool:
    """Whether a class with a forward of its own computes what nn.Linear does: tried on a few numbers."""
    if kind.forward is nn.Linear.forward:
        return True
    with torch.random.fork_rng(), torch.no_grad():
        probe = kind.__new__(kind)
        nn.Linear.__init__(probe, 4, 6, device="cpu")
        x = torch.randn(2, 3, 4, device="cpu")
        try:
            out = probe(x)
            return isinstance(out, Tensor) and torch.allclose(out, nn.functional.linear(x, probe.weight, probe.bias))
        except Exception:  # it wants other inputs or attributes
            return False


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stores its matrix as [K, N]; its shape does not tell where it is square."""
    return isinstance(module, Conv1D)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(N outputs, K inputs) of a linear, whichever way round it stores them."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def head_size(model: Any) -> int:
    """Columns of an attention head, by the model's configuration."""
    config = model.config.get_text_config()
    return int(config_value(config, "head_dim") or config.hidden_size // config_value(config, "num_attention_heads"))


def position_count(model: Any) -> int | None:
    """How many positions a model has tables for (learned, or computed beforehand); None where any number goes."""
    text = model.config.get_text_config()
    found = (getattr(text, name, None) for name in _POSITIONS)
    count = next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), None)
    if count is None:
        return None
    embedding = model.get_input_embeddings().weight
    tables = [t.shape for t in (*model.parameters(), *model.buffers()) if t is not embedding and t.ndim >= 2]
    learned = any(count <= shape[0] <= count + _OFFSET and len(shape) == 2 for shape in tables)
    return count if learned or any(len(shape) == 4 and shape[-1] == count for shape in tables) else None


def config_value(config: Any, name: str) -> Any:
    """A value of a configuration, the largest where it differs from layer to layer; None where there is none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers refuses to name one of several
        return max(getattr(config.per_layer_config[i], name) for i in range(config.num_hidden_layers))


def find_layout(model: Any) -> Layout:
    """Finds the parts of a model.

    Raises:
        InputError: there are no repeated blocks with linears.
    """
    family = FAMILIES.get(model.config.model_type)
    path = family.blocks if family else _block_list(model)
    gates = family.keep_float if family else _GATES
    try:
        blocks = model.get_submodule(path)
    except AttributeError as error:
        raise InputError(f"{type(model).__name__} has no {path}; its code is newer or older than we know") from error
    names = {id(module): name for name, module in model.named_modules()}
    linears = tuple(
        f"{path}.{number}.{name}"
        for number, block in enumerate(blocks)
        for name, module in block.named_modules()
        if is_linear(module) and not _is_router(module, name, gates)
    )
    if not linears:
        raise InputError(f"{type(model).__name__} has no linear layers to quantize")
    head = model.get_output_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return Layout(
        blocks=tuple(f"{path}.{number}" for number in range(len(blocks))),
        linears=linears,
        embedding=names[id(model.get_input_embeddings())],
        head=names.get(id(head)) if head is not None else None,
        tied=tied,
        final_norm=family.final_norm if family else _norm_beside(model, path),
        known=family is not None,
    )


def _is_router(module: nn.Module, name: str, gates: tuple[str, ...]) -> bool:
    """Whether a linear chooses experts or weighs branches: named so, and with few outputs."""
    rows, columns = weight_shape(module)
    return name.rsplit(".", 1)[-1] in gates and 4 * rows <= columns


def _block_list(model: Any) -> str:
    """The path of the list of modules with linears that stands nearest to the embedding, and shallowest.

    Entries may be of several classes (attention and state spaces in turns); lists within a block are deeper.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding = names[id(model.get_input_embeddings())].split(".")
    candidates: list[tuple[int, int, int, str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        sizes = [sum(math.prod(weight_shape(m)) for m in entry.modules() if is_linear(m)) for entry in module]
        if all(sizes):
            parts = name.split(".")
            shared = next((i for i, (x, y) in enumerate(zip(parts, embedding, strict=False)) if x != y), 0)
            candidates.append((shared, -len(parts), sum(sizes), name))
    if not candidates:
        raise InputError(f"{type(model).__name__} has no repeated blocks with linear layers")
    return max(candidates)[3]


def _norm_beside(model: nn.Module, blocks: str) -> str | None:
    parent = blocks.rpartition(".")[0]
    norms = [n for n, m in model.get_submodule(parent).named_children() if "norm" in type(m).__name__.lower()]
    return f"{parent}.{norms[-1]}".lstrip(".") if len(norms) == 1 else None
