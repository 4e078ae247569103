"""What a model's weights are, without their values: one record per stored weight."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BitsRow", "WeightRecord", "bits_histogram", "quantized_bits_per_weight", "total_bits_per_weight"]


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
    groups: dict[tuple[bool, float], list[WeightRecord]] = defaultdict(list)
    for record in records:
        groups[not record.quantized, record.bits].append(record)
    return [
        BitsRow(
            label=f"{'float' if is_float else ''}{bits:g}{'' if is_float else '-bit'}",
            tensors=len(found),
            parameters=sum(r.parameters for r in found),
            size_bytes=sum(r.size_bytes for r in found),
        )
        for (is_float, bits), found in sorted(groups.items())
    ]


def quantized_bits_per_weight(records: Sequence[WeightRecord]) -> float | None:
    """Stored bits per weight of what is quantized, scales and zero points included; None where nothing is."""
    return total_bits_per_weight([r for r in records if r.quantized])


def total_bits_per_weight(records: Sequence[WeightRecord]) -> float | None:
    """Stored bits per weight of all records; None where there are none."""
    parameters = sum(r.parameters for r in records)
    return 8 * sum(r.size_bytes for r in records) / parameters if parameters else None
