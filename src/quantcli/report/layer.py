"""What became of one matrix."""

from dataclasses import dataclass

__all__ = ["LayerReport"]


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear."""

    name: str
    kind: str
    """Last part of the name."""
    algorithm: str
    bits: int
    group_size: int
    symmetric: bool
    parameters: int
    size_bytes: int
    """Packed, scales and zeros included."""
    relative_error: float
    """Squared error of the output over the output's square under the calibration inputs; of the weight without data."""
    rtn_relative_error: float
    """The same for round-to-nearest, on a sample of rows."""
    tokens: int
    """Calibration tokens that reached it."""
    seconds: float
    scaled: bool = False
    """Whether a transform scaled its inputs."""
