"""Which type each tensor has in a file of type q4_k_m and the like: llama.cpp's own mixes, as of `llama-quant.cpp`.

Sensitive tensors get more bits: values and down projections of some layers, the output head. Where a row is no whole
number of super-blocks of 256, a type with blocks of 32 takes the place of a K type; where not even those fit, the
tensor stays float.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quantcli.tensors.block_types import BLOCK_TYPES

__all__ = ["MIXES", "MixedModel", "fitting", "wanted_type"]

MIXES: Mapping[str, str] = {
    "q2_k": "q2_k",
    "q3_k_s": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_l": "q3_k",
    "q4_0": "q4_0",
    "q4_1": "q4_1",
    "q4_k_s": "q4_k",
    "q4_k_m": "q4_k",
    "q5_0": "q5_0",
    "q5_1": "q5_1",
    "q5_k_s": "q5_k",
    "q5_k_m": "q5_k",
    "q6_k": "q6_k",
    "q8_0": "q8_0",
}
"""The type of most tensors, by mix."""
_SMALLER_BLOCKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_MANY_EXPERTS = 8  # the one number of experts that has rules of its own


@dataclass(frozen=True)
class MixedModel:
    """What the rules ask about a model."""

    layers: int
    heads: int
    """Query heads."""
    groups: int
    """Key-value heads."""
    experts: int
    llama: bool
    """Whether it is of llama.cpp's architecture of that name."""
    tied: bool
    """Whether the embedding is the output head."""


def fitting(wanted: str, columns: int) -> str | None:
    """The type, or that with smaller blocks which takes its place in rows of so many columns; None where none fits."""
    for name in (wanted, _SMALLER_BLOCKS.get(wanted, wanted)):
        if columns % BLOCK_TYPES[name].columns == 0:
            return name
    return None


def wanted_type(mix: str, name: str, model: MixedModel) -> str:
    """The type of one tensor, as far as its rows allow.

    Args:
        mix: A key of `MIXES`.
        name: The tensor's name in the file.
        model: Whose tensor it is.
    """
    base = MIXES[mix]
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind == "output" or (kind == "token_embd" and model.tied):
        return "q8_0" if base == "q8_0" else "q6_k"
    if not name.startswith("blk."):
        return base
    layer = int(name.split(".")[1])
    if kind in ("attn_v", "attn_qkv"):
        return _values(mix, base, layer, model)
    if kind == "attn_k" and model.experts == _MANY_EXPERTS:
        return "q8_0"
    if kind.startswith("ffn_down"):
        return _down(mix, base, layer, model.layers)
    if kind == "attn_output":
        return _attention_output(mix, base, model)
    return base


def _values(mix: str, base: str, layer: int, model: MixedModel) -> str:
    """Of values, and of q, k and v as one."""
    found = base
    if mix == "q2_k":
        found = "q4_k" if model.heads // model.groups >= 4 else "q3_k"
    elif mix == "q3_k_m":
        found = "q5_k" if layer < 2 else "q4_k"
    elif mix == "q3_k_l" or (mix == "q4_k_s" and layer < 4):
        found = "q5_k"
    elif mix in ("q4_k_m", "q5_k_m") and _deserves_more(layer, model.layers):
        found = "q6_k"
    if model.llama and model.layers == 80 and model.heads != model.groups and found in ("q3_k", "q4_k"):
        found = "q5_k"  # the largest llama: few heads share values, which cost little
    return "q8_0" if model.experts == _MANY_EXPERTS else found


def _down(mix: str, base: str, layer: int, layers: int) -> str:
    if mix == "q2_k":
        return "q3_k"
    if mix == "q3_k_m":
        return "q5_k" if layer < layers // 16 else "q4_k"
    if mix == "q3_k_l" or (mix == "q4_k_s" and layer < layers // 8):
        return "q5_k"
    if mix in ("q4_k_m", "q5_k_m") and _deserves_more(layer, layers):
        return "q6_k"
    return base


def _attention_output(mix: str, base: str, model: MixedModel) -> str:
    if model.experts == _MANY_EXPERTS:
        return "q5_k" if mix in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m") else base
    return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mix, base)


def _deserves_more(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
