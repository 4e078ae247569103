"""Writes the GGUF file of a checkpoint: numbers, tokens, then tensor by tensor, none of them twice in memory."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.formats.gguf import PART
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.gguf.families import GgufFamily, describe, rope_factors
from quantcli.models.gguf.names import GgufTensor, regroup
from quantcli.models.gguf.vocabulary import Vocabulary
from quantcli.tensors.block_types import BLOCK_TYPES

__all__ = ["GgufContent", "write_gguf"]


@dataclass(frozen=True)
class GgufContent:
    """What a file says beside its tensors."""

    config: Any
    """transformers' configuration of the text model."""
    family: GgufFamily
    tensors: Sequence[GgufTensor]
    vocabulary: Vocabulary
    name: str
    """Of the model, for people."""
    mix: str | None
    """q4_k_m and the like; None where all tensors are float."""
    producer: str
    """Who quantized."""


def write_gguf(
    path: Path, stored: Checkpoint, disk_names: Mapping[str, str], types: Mapping[str, str], content: GgufContent
) -> None:
    """Writes a file that appears whole or not at all.

    Args:
        path: The file.
        stored: Its tensors, as `X.weight` (or `X.bias`) or, packed, as `X.blocks`.
        disk_names: Name on disk of each parameter, by module path.
        types: Block type of each packed matrix, by the name that its parameter has on disk.
        content: What it says beside.
    """
    import gguf

    temporary = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, content.family.architecture)
    _describe(writer, content)
    pieces = [_Piece(tensor, stored, disk_names, types) for tensor in content.tensors]
    extra = {name: np.array(values, dtype=np.float32) for name, values in rope_factors(content.config).items()}
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for piece in pieces:
        writer.add_tensor_info(piece.tensor.name, piece.shape, piece.dtype, piece.size_bytes, piece.raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra.values():
        writer.write_tensor_data(values)
    for piece in pieces:
        writer.write_tensor_data(piece.read())
    writer.close()
    os.replace(temporary, path)


def _describe(writer: Any, content: GgufContent) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(content.vocabulary.named(content.name))
    writer.add_quantized_by(content.producer)
    if content.mix is not None:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{content.mix.upper()}"])
    describe(writer, content.config, content.family)
    content.vocabulary.write(writer)


class _Piece:
    """One tensor of the file and where it comes from."""

    def __init__(self, tensor: GgufTensor, stored: Checkpoint, disk_names: Mapping[str, str], types: Mapping[str, str]):
        self.tensor, self._stored = tensor, stored
        names = [disk_names[source] for source in tensor.sources]
        self._kind = BLOCK_TYPES.get(types.get(names[0], ""))
        if self._kind is not None:
            names = [f"{name.removesuffix('.weight')}.{PART}" for name in names]
        self._names = names
        entry = stored.entries[names[0]]
        shape = entry.shape[::-1] if tensor.transposed and self._kind is None else entry.shape
        self.shape = (len(names), *shape) if tensor.stacked else shape
        wide = tensor.float32 or entry.dtype == torch.float64
        self._float = torch.float32 if wide else entry.dtype
        self.dtype = np.dtype(np.uint8) if self._kind is not None else np.dtype(np.float32)
        itemsize = 1 if self._kind is not None else self._float.itemsize
        self.size_bytes = int(np.prod(self.shape)) * itemsize

    @property
    def raw_type(self) -> Any:
        import gguf

        if self._kind is not None:
            return gguf.GGMLQuantizationType[self._kind.name.upper()]
        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        return gguf.GGMLQuantizationType[names[self._float]]

    def read(self) -> Any:
        """The bytes, as llama.cpp wants them."""
        parts = [self._one(name) for name in self._names]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _one(self, name: str) -> Any:
        values: Tensor = self._stored.read(name)
        if self._kind is None:
            if self.tensor.transposed:
                values = values.T
            if self.tensor.shift:
                values = values.float() + self.tensor.shift
            values = values.to(self._float)
        if self.tensor.heads:
            values = regroup(values, self.tensor.heads)
        return values.contiguous().view(torch.uint8).numpy()
