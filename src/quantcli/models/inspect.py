"""What the weights of a checkpoint are, read from its headers alone."""

from quantcli.formats import awq, gptq
from quantcli.formats.bitpack import packed_words
from quantcli.models.checkpoint import Checkpoint
from quantcli.tensors.inventory import WeightRecord

__all__ = ["checkpoint_records"]

# parts that describe a packed weight beside its codes; column indexes repeat their order and are not counted
_COUNTED = ("qweight", "qzeros", "scales")


def checkpoint_records(checkpoint: Checkpoint) -> list[WeightRecord]:
    """One record per weight; formats that we do not read count as the tensors that they store.

    Raises:
        InputError: the quantization_config is not what it says.
    """
    config = checkpoint.config.get("quantization_config") or {}
    method = config.get("quant_method") if isinstance(config, dict) else None
    packed = {n.removesuffix(".qweight") for n in checkpoint.entries if n.endswith(".qweight")}
    if method not in ("gptq", "awq"):
        packed = set()
    records = [_packed_record(checkpoint, name, method == "awq") for name in sorted(packed)]
    for name, entry in checkpoint.entries.items():
        module, _, leaf = name.rpartition(".")
        if module in packed and leaf in gptq.PARTS:
            continue
        count = entry.size_bytes // entry.dtype.itemsize
        bits = 8 * entry.dtype.itemsize
        records.append(WeightRecord(name, bits, not entry.dtype.is_floating_point, count, entry.size_bytes))
    return records


def _packed_record(checkpoint: Checkpoint, name: str, is_awq: bool) -> WeightRecord:
    entries, config = checkpoint.entries, checkpoint.config["quantization_config"]
    size = sum(entries[f"{name}.{p}"].size_bytes for p in _COUNTED if f"{name}.{p}" in entries)
    shape = entries[f"{name}.qweight"].shape
    if is_awq:
        bits = awq.scheme_of(config).bits
        return WeightRecord(name, bits, True, shape[0] * shape[1] * (32 // bits), size)
    bits = gptq_bits(config, name)
    index = entries.get(f"{name}.g_idx")
    columns = index.shape[0] if index is not None else shape[0] * 32 // bits
    if packed_words(columns, bits) != shape[0]:
        columns = shape[0] * 32 // bits
    return WeightRecord(name, bits, True, columns * shape[1], size)


def gptq_bits(config: dict[str, object], name: str) -> int:
    """Bits of one packed weight by a GPTQ `quantization_config`, embeddings of ours included."""
    ours = config.get("quantcli")
    embedding = ours.get("embedding") if isinstance(ours, dict) else None
    if embedding is not None and embedding["name"] == name:
        return int(embedding["bits"])
    scheme = gptq.scheme_of(config, name)
    return int(str(config.get("bits", 4))) if scheme is None else scheme.bits
