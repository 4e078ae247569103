"""Linears that servers run as one: the names that vLLM and SGLang give to q, k, v and to gate, up together.

They ask a `quantization_config` about the fused name, where the files and transformers have the shards.
"""

from collections.abc import Iterable

__all__ = ["fused_shards"]

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def fused_shards(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """By fused module name, those of the linears that it is made of; only where all of its shards are there."""
    known = set(names)
    found = {}
    for name in known:
        parent, dot, leaf = name.rpartition(".")
        for fused, shards in _FUSED.items():
            if leaf == shards[0] and all(f"{parent}{dot}{shard}" in known for shard in shards):
                found[f"{parent}{dot}{fused}"] = tuple(f"{parent}{dot}{shard}" for shard in shards)
    return dict(sorted(found.items()))
