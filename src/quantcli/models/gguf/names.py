"""What llama.cpp calls the tensors of a model, and how each is made of the checkpoint's.

`gguf`'s own tables translate names. Beyond them: the experts of a layer are one tensor, q and k may have their rows
regrouped, norms may be stored as 1 + w, and GPT-2's matrices stand the other way round.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.errors import InputError
from quantcli.models.gguf.families import GgufFamily
from quantcli.models.layout import is_transposed

__all__ = ["GgufTensor", "regroup", "tensors_of", "ungroup"]

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_SUFFIXES = (".weight", ".bias")
_ROTATED = ("attn_q.", "attn_k.")
_ALWAYS_FLOAT32 = ("ffn_gate_inp", "position_embd")
_DROPPED = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file."""

    name: str
    """As llama.cpp knows it."""
    sources: tuple[str, ...]
    """Module paths with .weight or .bias: one, or those of all experts of a layer in order."""
    heads: int = 0
    """Heads whose rows are regrouped; 0: none."""
    shift: float = 0.0
    """What is added to every value."""
    transposed: bool = False
    """Whether the checkpoint holds [K, N]."""
    float32: bool = False
    """Whether llama.cpp wants it in float32 where it is not quantized."""
    stacked: bool = False
    """Whether it has an axis of experts in front."""


def tensors_of(skeleton: Any, family: GgufFamily, *, head: str | None) -> list[GgufTensor]:
    """The tensors of a model's file, in the order of its modules.

    Args:
        skeleton: The model on the meta device.
        family: Its entry in the table.
        head: Module path of the output head where it has a matrix of its own.

    Raises:
        InputError: llama.cpp has no tensor for one of its parameters.
    """
    import gguf

    if family.tied is not None and family.tied != (head is None):
        what = "no head of its own" if family.tied else "no head that is the embedding"
        raise InputError(f"llama.cpp's {family.architecture} knows {what}", hint="use another --format")
    config = skeleton.config.get_text_config()
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    stacks: dict[str, list[str]] = {}
    found: list[GgufTensor] = []
    for path, parameter in skeleton.named_parameters():
        if _DROPPED.search(path) or (path.endswith("lm_head.weight") and head is None):
            continue
        merged = _EXPERT.sub(".experts.", path)
        name = names.get_name(_usual(merged, config.model_type), try_suffixes=_SUFFIXES)
        if name is None:
            raise InputError(f"llama.cpp's {family.architecture} has no tensor for {path}")
        if merged != path:
            stacks.setdefault(name, []).append(path)
            if len(stacks[name]) == 1:
                found.append(GgufTensor(name, (), stacked=True))
            continue
        found.append(_single(path, name, parameter.ndim, skeleton, family))
    if head is not None and not any(tensor.name == "output.weight" for tensor in found):  # tied in the skeleton
        found.append(GgufTensor("output.weight", (f"{head}.weight",)))
    return [_with_sources(tensor, stacks) for tensor in found]


def regroup(rows: Any, heads: int) -> Any:
    """Rows [N, ...] as llama.cpp turns them: of each head, row i of the first half beside row i of the second."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def ungroup(rows: Any, heads: int) -> Any:
    """The inverse of `regroup`."""
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _single(path: str, name: str, axes: int, skeleton: Any, family: GgufFamily) -> GgufTensor:
    config = skeleton.config.get_text_config()
    module = skeleton.get_submodule(path.rpartition(".")[0])
    stem, _, leaf = name.rpartition(".")
    kind = stem.rpartition(".")[2]
    if leaf == "bias" and kind not in family.biases:
        raise InputError(f"llama.cpp's {family.architecture} has no tensor for {path}: it knows no bias there")
    heads = 0
    if family.regroups and f"{kind}." in _ROTATED:
        heads = config.num_attention_heads
        if kind == "attn_k":
            heads = getattr(config, "num_key_value_heads", None) or heads
    norm = kind.endswith("norm")
    return GgufTensor(
        name,
        (path,),
        heads=heads,
        shift=1.0 if norm and leaf == "weight" and family.shifted_norms else 0.0,
        transposed=leaf == "weight" and is_transposed(module),
        float32=axes < 2 or norm or kind.startswith(_ALWAYS_FLOAT32),
    )


def _with_sources(tensor: GgufTensor, stacks: dict[str, list[str]]) -> GgufTensor:
    if not tensor.stacked:
        return tensor
    sources: Sequence[str] = sorted(stacks[tensor.name], key=_number)
    return GgufTensor(tensor.name, tuple(sources), stacked=True)


def _number(path: str) -> int:
    match = _EXPERT.search(path)
    assert match is not None
    return int(match[1])


def _usual(path: str, model_type: str) -> str:
    """A name that gguf's tables have: transformers 5 calls Mixtral's parts otherwise than its files do."""
    if model_type == "mixtral":
        if ".experts." in path:
            return path.replace(".mlp.experts.", ".feed_forward.experts.").removeprefix("model.")
        return path.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    return path
