"""Where things are kept that can be made or fetched again."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """`$QUANTCLI_CACHE`, else `quantcli` in the user's cache folder; it may not exist yet."""
    chosen = os.environ.get("QUANTCLI_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quantcli"
