"""What a model's weights are, without their values: one record per stored weight."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = [
    "BitsRow",
    "WeightRecord",
    "bits_histogram",
    "parameter_count",
    "quantized_bits_per_weight",
    "total_bits_per_weight",
]


@dataclass(frozen=True)
class WeightRecord:
    """One weight, quantized or not."""

    name: str
    """Module or tensor name."""
    bits: float
    """Bits of one code, or of one number where the weight is float."""
    quantized: bool
    """Whether codes with scales stand for it."""
    parameters: int
    """Numbers that it stands for."""
    size_bytes: int
    """Stored bytes: codes, scales and zero points; column indexes that only repeat their order are not counted."""
    dtype: str | None = None
    """Name of the type of a float weight, where it is known."""
    shared: bool = False
    """Whether it stands for numbers that another record stands for too: a head that was untied from the embedding."""


@dataclass(frozen=True)
class BitsRow:
    """One line of a bits histogram."""

    label: str
    """`4-bit` for codes, `float32` and so on for floats."""
    tensors: int
    """Weights of this kind."""
    parameters: int
    """Numbers that they stand for."""
    size_bytes: int
    """Their stored bytes."""


def bits_histogram(records: Sequence[WeightRecord]) -> list[BitsRow]:
    """Counts weights by bits: codes first, fewest bits first."""
    groups: dict[tuple[bool, float, str], list[WeightRecord]] = defaultdict(list)
    for record in records:
        kind = f"{record.bits:g}-bit" if record.quantized else record.dtype or f"float{record.bits:g}"
        groups[not record.quantized, record.bits, kind].append(record)
    return [
        BitsRow(
            label=label,
            tensors=len(found),
            parameters=sum(r.parameters for r in found),
            size_bytes=sum(r.size_bytes for r in found),
        )
        for (_, _, label), found in sorted(groups.items())
    ]


def parameter_count(records: Sequence[WeightRecord]) -> int:
    """Numbers that all records stand for; those that two stand for count once."""
    return sum(r.parameters for r in records if not r.shared)


def quantized_bits_per_weight(records: Sequence[WeightRecord]) -> float | None:
    """Stored bits per weight of what is quantized, scales and zero points included; None where nothing is."""
    found = [replace(r, shared=False) for r in records if r.quantized]
    return total_bits_per_weight(found)


def total_bits_per_weight(records: Sequence[WeightRecord]) -> float | None:
    """Stored bits per weight of all records, weights that are stored twice counted once; None where there are none."""
    parameters = parameter_count(records)
    return 8 * sum(r.size_bytes for r in records) / parameters if parameters else None
