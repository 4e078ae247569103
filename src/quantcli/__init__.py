"""quantcli makes language models small and fast, and proves with numbers that they are still good."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantcli.models.load import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch and transformers stay unimported until somebody loads a model: `--help` must answer at once
    if name == "load":
        from quantcli.models.load import load

        return load
    raise AttributeError(f"module 'quantcli' has no attribute {name!r}")
