"""Which rows of which matrices an initializer stands for."""

from dataclasses import dataclass

__all__ = ["NamedRows", "RowRange"]


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of one matrix of the checkpoint."""

    name: str
    """Module name, such as model.layers.0.mlp.up_proj."""
    start: int
    stop: int


@dataclass(frozen=True)
class NamedRows:
    """Rows [N, K] of named matrices, or their transpose [K, N]; `checkpoint_rows.Rows` is the same for exporters."""

    ranges: tuple[RowRange, ...]
    """The rows, in order."""
    columns: int
    """K."""
    transposed: bool = False
    """Whether the initializer is [K, N]."""
