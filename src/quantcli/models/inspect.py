"""What the weights of a checkpoint are, and who opens it, read from its headers alone."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from quantcli.errors import InputError
from quantcli.formats import compressed_config
from quantcli.formats.layouts import LAYOUTS
from quantcli.formats.opening import Contents, StoredLinear
from quantcli.models.checkpoint import Checkpoint, TensorEntry
from quantcli.models.marks import find_mark
from quantcli.models.readers import Reader, find_reader, packed_names
from quantcli.tensors.inventory import WeightRecord

__all__ = ["checkpoint_contents", "checkpoint_records"]

_FORMATS = {"gptq": "gptq", "awq": "awq", "bitsandbytes": "bnb", "gguf": "gguf"}
_BLOCK = re.compile(r"(?P<block>.*?\.\d+)\.")
_CODES = ("weight", "qweight", "weight_packed", "blocks")
_SCALES = re.compile(
    r"(weight_scale(_inv|_2)?|weight_global_scale|weight_zero_point|weight_shape|weight_g_idx|scale|scales|scale_inv|"
    r"qzeros|g_idx|SCB|weight_format|(input|output)_(scale|global_scale|zero_point)|[qkv]_(scale|zero_point))"
)


def checkpoint_records(checkpoint: Checkpoint) -> list[WeightRecord]:
    """One record per weight; of formats that we do not read, the codes with the scales beside them."""
    shared = str((checkpoint.config.get("quantcli") or {}).get("untied_head"))
    reader = find_reader(checkpoint.config.get("quantization_config"))
    try:
        return _records(checkpoint, reader, shared)
    except InputError:  # a layout of a known method that is not read
        return _records(checkpoint, None, shared)


def checkpoint_contents(checkpoint: Checkpoint) -> Contents | None:
    """What readers differ about; None of formats that none of ours writes."""
    config, model_type = checkpoint.config.get("quantization_config"), str(checkpoint.config.get("model_type"))
    online = find_mark(checkpoint.config, "online_rotations") is not None
    if not isinstance(config, dict):
        return Contents("float", model_type, None, {}, (), (), online=online)
    reader, stored = find_reader(config), _format_of(config)
    if reader is None or stored is None:
        return None
    embedding = ((config.get("quantcli") or {}).get("embedding") or {}).get("name")
    try:
        found = {name: _stored(checkpoint, name, reader) for name in packed_names(checkpoint, reader)}
    except InputError:
        return None
    linears = {name: linear for name, linear in found.items() if _BLOCK.match(name)}
    blocks = list(dict.fromkeys(m["block"] for name in linears if (m := _BLOCK.match(name))))
    kept = [
        name.removesuffix(".weight")
        for name, entry in checkpoint.entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and entry.dtype.is_floating_point and _BLOCK.match(name)
    ]
    schemes = [linear.scheme for linear in linears.values()]
    return Contents(
        format=stored,
        model_type=model_type,
        default=max(set(schemes), key=schemes.count) if schemes else None,
        linears=linears,
        kept=kept,
        blocks=blocks,
        head=next((x for name, x in found.items() if name not in linears and name != embedding), None),
        embedding=embedding is not None,
        desc_act=bool(config.get("desc_act")),
        online=online,
        rounds_cache=bool(config.get("kv_cache_scheme")),
    )


def _format_of(config: Mapping[str, Any]) -> str | None:
    """As in `--format`; None of what we do not write."""
    method = str(config.get("quant_method"))
    if config.get("load_in_8bit"):
        return "bnb-int8"
    if method != compressed_config.METHOD:
        return _FORMATS.get(method)
    layouts = compressed_config.layouts_of(config)
    if layouts == {compressed_config.INTEGER_LAYOUT}:
        return compressed_config.METHOD
    return next(iter(layouts)) if len(layouts) == 1 and layouts <= set(LAYOUTS) else None


def _records(checkpoint: Checkpoint, reader: Reader | None, shared: str) -> list[WeightRecord]:
    records: list[WeightRecord] = []
    described: set[str] = set()
    for name in packed_names(checkpoint, reader) if reader is not None else []:
        assert reader is not None
        records.append(_packed_record(checkpoint, name, reader, name == shared))
        described.update(f"{name}.{part}" for part in reader.parts)
    modules: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in checkpoint.entries.items():
        if name not in described:
            module, _, leaf = name.rpartition(".")
            modules[module][leaf] = entry
    for module, entries in modules.items():
        records += _plain_records(module, entries, checkpoint.config.get("quantization_config"), module == shared)
    return records


def _plain_records(module: str, entries: Mapping[str, TensorEntry], config: Any, shared: bool) -> list[WeightRecord]:
    """Tensors as they are; scales that stand beside codes are theirs."""
    codes = next((leaf for leaf in _CODES if leaf in entries), None) if isinstance(config, dict) else None
    beside = [leaf for leaf in entries if leaf != codes and _SCALES.fullmatch(leaf)] if codes is not None else []
    records = []
    for leaf, entry in entries.items():
        if leaf in beside:
            continue
        scales = sum(entries[name].size_bytes for name in beside) if leaf == codes else 0
        bits: float = 8 * entry.dtype.itemsize
        plain = entry.dtype.is_floating_point and not scales
        if leaf == codes and not entry.dtype.is_floating_point and leaf != "weight":
            bits = _code_bits(config, entry)
        count = int(entry.size_bytes * 8 // bits)
        kind = str(entry.dtype).removeprefix("torch.") if plain else None
        name = f"{module}.{leaf}" if module else leaf
        records.append(WeightRecord(name, bits, not plain, count, entry.size_bytes + scales, kind, shared))
    return records


def _code_bits(config: Mapping[str, Any], entry: TensorEntry) -> int:
    """Bits of a code in words that hold several."""
    groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, Mapping)]
    given = [
        config.get("bits"), config.get("w_bit"), *((g.get("weights") or {}).get("num_bits") for g in groups),
    ]  # fmt: skip
    bits = next((b for b in given if isinstance(b, int) and 1 <= b <= 8), 4)
    return bits if bits <= 8 * entry.dtype.itemsize else 8 * entry.dtype.itemsize


def _stored(checkpoint: Checkpoint, name: str, reader: Reader) -> StoredLinear:
    return StoredLinear(
        *reader.linear(checkpoint.config["quantization_config"], name, _parts(checkpoint, name, reader))
    )


def _parts(checkpoint: Checkpoint, name: str, reader: Reader) -> dict[str, TensorEntry]:
    return {p: checkpoint.entries[f"{name}.{p}"] for p in reader.parts if f"{name}.{p}" in checkpoint}


def _packed_record(checkpoint: Checkpoint, name: str, reader: Reader, shared: bool) -> WeightRecord:
    entries = _parts(checkpoint, name, reader)
    size = sum(entry.size_bytes for part, entry in entries.items() if part not in reader.uncounted)
    stored = _stored(checkpoint, name, reader)
    return WeightRecord(name, stored.scheme.bits, True, stored.rows * stored.columns, size, None, shared)
