"""A file that said part of the options."""

from dataclasses import dataclass

__all__ = ["ConfigurationFile"]


@dataclass(frozen=True)
class ConfigurationFile:
    """What a manifest keeps of a file of options: what it said stands among the options themselves."""

    name: str
    """File name, without its folder."""
    sha256: str
    """Digest of its bytes."""
