"""Arrays that numpy wrote: `.npy` and `.npz` files, read through one guard."""

from pathlib import Path

import numpy as np

from quantcli.errors import InputError, first_line

__all__ = ["read_npy", "read_npz"]


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name.

    Raises:
        InputError: it is none, a member is broken, holds Python objects, or does not fit in memory.
    """
    what = "an .npz file of plain arrays"
    found = _load(file, what)
    if isinstance(found, np.ndarray):
        raise InputError(f"{file} is not {what}: it holds one array without a name", hint="write it with numpy.savez")
    arrays: dict[str, np.ndarray] = {}
    with found:
        for name in found.files:
            try:
                array = found[name]
            except Exception as error:
                raise _refusal(f"{file} is not {what}: {name}", error) from error
            if not isinstance(array, np.ndarray):  # a member that is no .npy comes as bytes
                raise InputError(f"{file} is not {what}: {name} is no array")
            arrays[name] = array
    return arrays


def read_npy(file: Path) -> np.ndarray:
    """The array of an `.npy` file.

    Raises:
        InputError: it is none, is broken, holds Python objects, or does not fit in memory.
    """
    found = _load(file, "an .npy file of plain numbers")
    if not isinstance(found, np.ndarray):
        found.close()
        raise InputError(f"{file} is not an .npy file of plain numbers")
    return found


def _load(file: Path, what: str) -> "np.ndarray | np.lib.npyio.NpzFile":
    """What numpy opens; the members of an archive are not read yet."""
    try:
        return np.load(file, allow_pickle=False)  # type: ignore[no-any-return]
    except Exception as error:
        raise _refusal(f"{file} is not {what}", error) from error


def _refusal(message: str, error: Exception) -> InputError:
    """The error for whatever reading raised.

    numpy, zipfile, zlib, struct and the parser of headers raise a dozen types of their own for damaged files, none of
    which says more than another.
    """
    if isinstance(error, MemoryError):
        return InputError(f"{message}: an array of it does not fit in memory ({first_line(error)})")
    return InputError(f"{message}: {first_line(error)}")
