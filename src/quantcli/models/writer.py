"""Writes a checkpoint shard by shard, then joins the shards to files of the size that everybody has.

A shard is what a run has finished at once, a block as a rule. It appears whole or not at all, so that a run which is
killed goes on behind it; joined, a small model is one file.
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quantcli.errors import InputError
from quantcli.folder import write_json
from quantcli.models.checkpoint import INDEX, Checkpoint, TensorEntry, read_header

__all__ = ["FILE_BYTES", "CheckpointWriter", "replace_tensors", "write_tensors"]

FILE_BYTES = 5_000_000_000
"""Largest file, unless one shard is larger."""
_PIECE = 1 << 24
_ALIGNMENT = 8


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes one safetensors file.

    Raises:
        OSError: with its errno, which safetensors gives only inside a text.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def replace_tensors(checkpoint: Checkpoint, changed: Mapping[str, Tensor]) -> None:
    """Writes other values of some tensors into the files of a checkpoint; every other byte stays.

    Each file is replaced at once, and writing the same again does no harm.

    Args:
        checkpoint: Whose files are ours to change.
        changed: By name, tensors of the stored dtype and shape.
    """
    files: dict[Path, list[str]] = {}
    for name, tensor in changed.items():
        entry = checkpoint.entries[name]
        assert entry.dtype == tensor.dtype and entry.shape == tuple(tensor.shape), name
        files.setdefault(entry.file, []).append(name)
    for path, names in files.items():
        temporary = path.with_suffix(".tmp")
        shutil.copyfile(path, temporary)
        with temporary.open("r+b") as stream:
            for name in names:
                stream.seek(checkpoint.entries[name].start)
                stream.write(changed[name].cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        os.replace(temporary, path)


class CheckpointWriter:
    """Writes shards that appear whole or not at all, then the files and the index."""

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES):
        """No shard is written yet.

        Args:
            folder: An existing one.
            file_bytes: Up to so many bytes of shards are joined to one file.
        """
        self.folder = folder
        self._file_bytes = file_bytes

    def shard(self, number: int) -> Path:
        """The file of one shard while shards are written."""
        return self.folder / f"shard-{number:05d}.safetensors"

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> Path:
        """Writes one shard."""
        path = self.shard(number)
        temporary = path.with_suffix(".tmp")
        write_tensors({n: t.contiguous() for n, t in tensors.items()}, temporary)
        os.replace(temporary, path)
        return path

    def finish(self, count: int) -> None:
        """Joins shards 0..count-1 to files with the names that transformers expects, and writes the index.

        May be repeated, also where it was interrupted: shards are deleted once the file that holds them is whole.
        """
        self._join(count)
        named = sorted(self.folder.glob("model*.safetensors"))
        joined = sorted(self.folder.glob("joined-*.safetensors"))
        files = len(named) + len(joined)
        for number, path in enumerate(joined, len(named) + 1):
            os.replace(path, self.folder / _file_name(number, files))
        weight_map: dict[str, str] = {}
        total = 0
        for number in range(1, files + 1):
            name = _file_name(number, files)
            for tensor, entry in read_header(self.folder / name).items():
                weight_map[tensor] = name
                total += entry.size_bytes
        if files > 1:
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _join(self, count: int) -> None:
        """Shards become `joined-FIRST-LAST`, in order."""
        for path in self.folder.glob("joined-*.safetensors"):  # an interrupted run may have left their shards
            first, last = (int(number) for number in path.stem.split("-")[1:])
            self._forget(range(first, last + 1))
        run: list[int] = []
        size = 0
        for number in range(count):
            if not self.shard(number).exists():
                continue
            bytes_more = self.shard(number).stat().st_size
            if run and size + bytes_more > self._file_bytes:
                self._join_run(run)
                run, size = [], 0
            run.append(number)
            size += bytes_more
        if run:
            self._join_run(run)

    def _join_run(self, run: list[int]) -> None:
        path = self.folder / f"joined-{run[0]:05d}-{run[-1]:05d}.safetensors"
        if len(run) == 1:
            os.replace(self.shard(run[0]), path)
            return
        entries: dict[str, TensorEntry] = {}
        for number in run:
            found = read_header(self.shard(number))
            if twice := found.keys() & entries.keys():
                raise InputError(f"tensor {min(twice)} is in two shards of {self.folder}")
            entries |= found
        temporary = path.with_suffix(".tmp")
        _write_joined(entries, temporary)
        os.replace(temporary, path)
        self._forget(run)

    def _forget(self, numbers: "range | list[int]") -> None:
        for number in numbers:
            self.shard(number).unlink(missing_ok=True)


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_joined(entries: Mapping[str, TensorEntry], path: Path) -> None:
    """Copies tensors into one file, wide types first, so that each lies at a multiple of its size."""
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        entry, start = entries[name], end
        end += entry.size_bytes
        header[name] = {"dtype": entry.kind, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            entry = entries[name]
            with entry.file.open("rb") as source:
                source.seek(entry.start)
                left = entry.size_bytes
                while left:
                    piece = source.read(min(left, _PIECE))
                    if not piece:
                        raise InputError(f"{entry.file} ends in the middle of tensor {name}")
                    target.write(piece)
                    left -= len(piece)
