"""Marks on folders that transformers would open and compute nonsense of: a model type that nobody else knows.

A marked config.json names a model type and architectures of ours, so that others refuse the folder in words; the real
ones stand in the mark, and `read_config` gives them back.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["add_mark", "find_mark", "is_marked", "restored_config", "without_mark"]

_KEY = "quantcli"
_NAMES = {
    "online_rotations": ("_online_rotated", "OnlineRotated"),
    "quantized_embedding": ("_quantized_embedding", "QuantizedEmbedding"),
}
"""What is added to model type and architectures, by the name of the mark."""


def add_mark(config: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with a mark.

    Args:
        config: As it is without this mark; others may stand in it.
        name: Of the mark.
        entry: What the mark says.
    """
    real = restored_config(dict(config))
    kept = {"model_type": real["model_type"], "architectures": real.get("architectures")}
    out = dict(config) | {_KEY: dict(config.get(_KEY) or {}) | {name: dict(entry) | kept}}
    of_type, of_class = _NAMES[name]
    out["model_type"] = f"{config['model_type']}{of_type}"
    out["architectures"] = [f"{architecture}{of_class}" for architecture in config.get("architectures") or []]
    return out


def find_mark(config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What a mark says, as far as it is one; None where there is none."""
    ours = config.get(_KEY)
    entry = ours.get(name) if isinstance(ours, dict) else None
    return entry if isinstance(entry, dict) else None


def is_marked(config: Mapping[str, Any]) -> bool:
    """Whether config.json hides a model type."""
    return any(find_mark(config, name) is not None for name in _NAMES)


def without_mark(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A restored config without a mark, once what it says is no longer so."""
    ours = {key: value for key, value in (config.get(_KEY) or {}).items() if key != name}
    return {key: value for key, value in config.items() if key != _KEY} | ({_KEY: ours} if ours else {})


def restored_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config as it is read, with the model type and architectures that a mark has hidden."""
    for name in _NAMES:
        entry = find_mark(config, name) or {}
        hidden = {key: entry[key] for key in ("model_type", "architectures") if entry.get(key) is not None}
        config = config | hidden
    return config
