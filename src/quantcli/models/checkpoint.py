"""A Hugging Face checkpoint as a set of named tensors, read and written one at a time; never pickle.

Headers are checked before a byte of data is read: a damaged or hostile file is refused with its name.
"""

import itertools
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.json_files import as_type, read_json
from quantcli.models.marks import restored_config
from quantcli.tensors.finite import require_finite

__all__ = [
    "INDEX",
    "Checkpoint",
    "MadeEntry",
    "TensorEntry",
    "copy_companions",
    "read_config",
    "read_header",
]

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_MAX_HEADER = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# a quantized copy brings its own weights and indexes; everything else of a folder travels along
_NOT_COMPANIONS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|h5|msgpack|gguf|onnx|onnx\.data|data)$|.*\.index\.json$|\..*"
)


@dataclass(frozen=True)
class _Config:
    """What of `config.json` is not left to transformers."""

    model_type: str | None = None
    architectures: list[str] | None = None
    text_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Index:
    """`model.safetensors.index.json`."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor stands."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start

    @property
    def kind(self) -> str:
        """The dtype's name in headers."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)


@dataclass(frozen=True)
class MadeEntry(TensorEntry):
    """A tensor that no file holds as it is; its place is counted as if one did."""

    make: Callable[[int, int], Tensor]
    """Rows [first, last) of its first axis."""
    whole: tuple[int, ...]
    """The shape of all of it: an entry may stand for some of its rows."""

    def read(self) -> Tensor:
        """What stands at this place."""
        size = math.prod(self.whole[1:]) * self.dtype.itemsize
        return self.make(self.start // size, self.stop // size).to(self.dtype).reshape(self.shape)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder, under the model type that it has without a mark of ours.

    Raises:
        InputError: there is none, or it is not JSON; the message says what was found instead.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())[:5]
        what = f"found {', '.join(found)}" if found else "it is empty"
        raise InputError(f"{folder} is not a model folder: no config.json ({what})", hint="give a checkpoint folder")
    config = read_json(path, dict[str, Any], what := "a model configuration")
    as_type(config, _Config, f"{path} is not {what}")
    return restored_config(config)


class Checkpoint:
    """The tensors of a folder of safetensors files."""

    def __init__(self, folder: Path, config: dict[str, Any], entries: dict[str, TensorEntry]):
        """Use `open`."""
        self.folder = folder
        self.config = config
        self.entries = entries
        self.origins: Mapping[str, tuple[str, ...]] = {}
        """For tensors that do not stand on disk as they are read: the names of those that they are made of."""

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Opens a folder and checks every header; `models.opened` takes GGUF files too.

        Raises:
            InputError: no config, no safetensors weights, or a file that is damaged.
        """
        config = read_config(folder)
        entries: dict[str, TensorEntry] = {}
        for path, wanted in _weight_files(folder).items():
            found = read_header(path)
            missing = [name for name in wanted or () if name not in found]
            if missing:
                raise InputError(f"{path}: the index places tensor {missing[0]} here, it is not in the file")
            entries.update(found if wanted is None else {name: found[name] for name in wanted})
        if not entries:
            raise InputError(f"{folder} holds no tensors")
        return cls(folder, config, entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def with_entries(self, entries: dict[str, TensorEntry]) -> "Checkpoint":
        """The same files, seen as if they held other tensors."""
        other = copy(self)
        other.entries = entries
        return other

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, in memory of its own (no mapping that would count as resident)."""
        return self.read_entry(name, self.entries[name])

    @staticmethod
    def read_entry(name: str, entry: TensorEntry) -> Tensor:
        """What stands at one place; `name` is for messages."""
        if isinstance(entry, MadeEntry):
            return entry.read()
        buffer = torch.empty(entry.size_bytes, dtype=torch.uint8)
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            view, done = memoryview(buffer.numpy().data), 0
            while done < entry.size_bytes:
                count = stream.readinto(view[done:])
                if not count:
                    raise InputError(f"{entry.file} ends in the middle of tensor {name}")
                done += count
        return (
            buffer.view(entry.dtype).reshape(entry.shape)
            if entry.size_bytes
            else torch.empty(entry.shape, dtype=entry.dtype)
        )

    def read_original(self, name: str) -> Tensor:
        """One tensor as it stands on disk."""
        return self.read(name)

    def require_finite(self) -> None:
        """Reads every tensor once, one at a time.

        Raises:
            InputError: one holds NaN or infinity; the message names it.
        """
        for name, entry in self.entries.items():
            if entry.dtype.is_floating_point:
                require_finite(self.read(name), f"{name} of {self.folder}")

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e.size_bytes for e in self.entries.values())


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file says it holds, checked against the format and the file's size."""
    size = path.stat().st_size

    def damaged(why: str) -> InputError:
        return InputError(f"{path} is damaged: {why}", hint="copy or download the file again")

    with path.open("rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            raise damaged(f"{size} bytes are too few for a safetensors file")
        (length,) = struct.unpack("<Q", head)
        if length > min(size - 8, _MAX_HEADER):
            raise damaged(f"its header length {length} exceeds the file's {size} bytes")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            items = [(n, v["dtype"], v["shape"], v["data_offsets"]) for n, v in header.items()]
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise damaged(f"its header cannot be read ({type(error).__name__})") from error
    entries = {}
    data = 8 + length
    for name, dtype, shape, offsets in items:
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise damaged(f"tensor {name} has unknown dtype {dtype!r}")
        if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
            raise damaged(f"tensor {name} has shape {shape!r}")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)):
            raise damaged(f"tensor {name} has offsets {offsets!r}")
        start, stop = offsets
        if stop - start != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise damaged(f"tensor {name} of shape {shape} and dtype {dtype} does not take {stop - start} bytes")
        if data + stop > size:
            raise damaged(f"tensor {name} ends at byte {data + stop}, the file has {size}")
        entries[name] = TensorEntry(path, _DTYPES[dtype], tuple(shape), data + start, data + stop)
    ordered = sorted((e.start, e.stop, n) for n, e in entries.items() if e.size_bytes)
    for (_, stop, name), (start, _, other) in itertools.pairwise(ordered):
        if start < stop:
            raise damaged(f"tensors {name} and {other} overlap")
    return entries


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files to read, each with the tensors that the index places there; None is all of them."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index, _Index, "a safetensors index").weight_map
        files: dict[Path, list[str] | None] = {}
        for name, file in weight_map.items():
            if file != os.path.basename(file) or not file.endswith(".safetensors"):
                raise InputError(f"{index} names the shard {file!r}: a plain *.safetensors file name is allowed")
            path = folder / file
            if not path.is_file():
                raise InputError(
                    f"shard {file} is named in {INDEX} but missing from {folder}",
                    hint="copy or download it again",
                )
            (files.setdefault(path, []) or files[path]).append(name)  # type: ignore[union-attr]
        return files
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return {p: None for p in found if not p.name.startswith("adapter_")}
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder} holds pickle weights ({pickles[0]}), which can run code when opened; only safetensors is read",
            hint="convert them with transformers' save_pretrained on a machine that trusts them",
        )
    names = sorted(p.name for p in folder.iterdir())[:5]
    raise InputError(f"{folder} holds no safetensors weights (found {', '.join(names)})")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies what is not weights (tokenizer, chat template, generation config, remote code); returns the names."""
    copied = []
    for path in _files_below(source):
        relative = path.relative_to(source)
        if relative.name == "config.json" and len(relative.parts) == 1:
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)
        copied.append(str(relative))
    return copied


def _files_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not _NOT_COMPANIONS.fullmatch(path.name) and not any(p.startswith(".") for p in parts):
            yield path
