"""What the weights of a checkpoint are, read from its headers alone."""

from quantcli.models.checkpoint import Checkpoint
from quantcli.models.readers import READERS, Reader, packed_names
from quantcli.tensors.inventory import WeightRecord

__all__ = ["checkpoint_records"]


def checkpoint_records(checkpoint: Checkpoint) -> list[WeightRecord]:
    """One record per weight; formats that we do not read count as the tensors that they store.

    Raises:
        InputError: the quantization_config is not what it says.
    """
    config = checkpoint.config.get("quantization_config")
    reader = READERS.get(str(config.get("quant_method"))) if isinstance(config, dict) else None
    names = packed_names(checkpoint, reader) if reader is not None else []
    records: list[WeightRecord] = []
    described: set[str] = set()
    for name in names:
        assert reader is not None
        records.append(_packed_record(checkpoint, name, reader))
        described.update(f"{name}.{part}" for part in reader.parts)
    for name, entry in checkpoint.entries.items():
        if name not in described:
            count = entry.size_bytes // entry.dtype.itemsize
            bits = 8 * entry.dtype.itemsize
            records.append(WeightRecord(name, bits, not entry.dtype.is_floating_point, count, entry.size_bytes))
    return records


def _packed_record(checkpoint: Checkpoint, name: str, reader: Reader) -> WeightRecord:
    entries = {p: checkpoint.entries[f"{name}.{p}"] for p in reader.parts if f"{name}.{p}" in checkpoint}
    size = sum(entry.size_bytes for part, entry in entries.items() if part not in reader.uncounted)
    bits, count = reader.weights(checkpoint.config["quantization_config"], name, entries)
    return WeightRecord(name, bits, True, count, size)
