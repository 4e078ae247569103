"""A GGUF file as a checkpoint: tensors under the names that transformers has for them, packed ones as they are.

Ours have config.json beside them; of others' files transformers makes one. Where a type is none of `BLOCK_TYPES`, the
`gguf` package dequantizes.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.errors import InputError, first_line
from quantcli.formats.gguf import PART
from quantcli.models.checkpoint import Checkpoint, TensorEntry, read_config
from quantcli.models.gguf.families import family_of
from quantcli.models.gguf.names import GgufTensor, tensors_of, ungroup
from quantcli.models.skeleton import build_skeleton

__all__ = ["GgufCheckpoint", "open_gguf"]

_NUMBERS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon", "rope.dimension_count", "rope.freq_base", "expert_count", "expert_used_count",
    "expert_feed_forward_length",
}  # fmt: skip
"""What transformers makes a configuration of, beside the size of heads, of which it knows nothing."""
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufCheckpoint(Checkpoint):
    """The tensors of one file."""

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        entries: dict[str, TensorEntry],
        places: Mapping[str, tuple[GgufTensor, str]],
    ):
        """Use `open_gguf`.

        Args:
            path: The file.
            config: Of the model, with the type of each packed matrix.
            entries: By name in the checkpoint.
            places: By the same names, the tensor and its type.
        """
        super().__init__(path.parent, config, entries)
        self.path, self._places = path, places

    def read(self, name: str) -> Tensor:
        """One tensor, or the bytes of its blocks, as a checkpoint has it."""
        tensor, _ = self._places[name]
        values = super().read(name)
        if tensor.heads:
            values = ungroup(values, tensor.heads)
        if tensor.shift:
            values = values - tensor.shift
        if tensor.transposed and not name.endswith(f".{PART}"):
            values = values.reshape(values.shape[::-1]).T
        return values.contiguous()

    def types_in_words(self) -> str:
        """How many tensors are of which type, most first."""
        tensors = {tensor.name: kind.lower() for tensor, kind in self._places.values()}
        return ", ".join(f"{count} {kind}" for kind, count in Counter(tensors.values()).most_common())

    def model_config(self) -> Any:
        """The configuration as transformers has it."""
        return _model_config(self.config)


def open_gguf(path: Path) -> GgufCheckpoint:
    """Opens a file; its header and index are read, its tensors later.

    Raises:
        InputError: it is damaged, of an architecture that we do not know, or its tensors are not the model's.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the package raises whatever numpy does
        raise InputError(
            f"{path} is damaged: {first_line(error) or type(error).__name__}", hint="copy or download the file again"
        ) from error
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, reader)
    skeleton = build_skeleton(path.parent, _model_config(config))
    head = next((n for n, m in skeleton.named_modules() if m is skeleton.get_output_embeddings()), None)
    own_head = head if "output.weight" in stored else None
    wanted = tensors_of(skeleton, family_of(skeleton.config.get_text_config()), head=own_head)
    entries: dict[str, TensorEntry] = {}
    places: dict[str, tuple[GgufTensor, str]] = {}
    types: dict[str, str] = {}
    for tensor in wanted:
        if tensor.name not in stored:
            raise InputError(f"{path} lacks tensor {tensor.name} that the model needs")
        for name, entry in _entries(path, tensor, stored[tensor.name]).items():
            entries[name] = entry
            kind = stored[tensor.name].tensor_type.name
            places[name] = (tensor, kind)
            if name.endswith(f".{PART}"):
                types[name.removesuffix(f".{PART}")] = kind.lower()
    config = config | {"tie_word_embeddings": own_head is None}
    if types:
        config |= {"quantization_config": {"quant_method": "gguf", "types": types}}
    return GgufCheckpoint(path, config, entries, places)


def _entries(path: Path, tensor: GgufTensor, found: Any) -> dict[str, TensorEntry]:
    """Where each of the checkpoint's tensors stands in one of the file's."""
    kind, start, size = found.tensor_type.name, int(found.data_offset), int(found.n_bytes)
    shape = tuple(int(n) for n in reversed(found.shape))
    if start + size > path.stat().st_size:
        raise InputError(f"{path} is damaged: tensor {found.name} ends behind the file")
    count = len(tensor.sources)
    if tensor.stacked:
        if shape[0] != count:
            raise InputError(f"{path}: tensor {found.name} has {shape[0]} experts, the model {count}")
        shape, size = shape[1:], size // count
    entries = {}
    for number, source in enumerate(tensor.sources):
        first = start + number * size
        if kind in _FLOATS:
            own = shape[::-1] if tensor.transposed else shape
            entries[source] = TensorEntry(path, _FLOATS[kind], own, first, first + size)
        else:
            name = f"{source.removesuffix('.weight')}.{PART}"
            rows = int(np.prod(shape[:-1]))
            entries[name] = TensorEntry(path, torch.uint8, (rows, size // rows), first, first + size)
    return entries


def _config(path: Path, reader: Any) -> dict[str, Any]:
    """config.json beside the file, or what transformers makes of its numbers."""
    if (path.parent / "config.json").is_file():
        return read_config(path.parent)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    numbers = {key: field.contents() for key, field in reader.fields.items()}
    prefix = f"{numbers.get('general.architecture')}."
    own = {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}
    unknown = sorted(own.keys() - _NUMBERS)
    if unknown or any(tensor.name.startswith("rope_") for tensor in reader.tensors):
        what = f"says {prefix}{unknown[0]}" if unknown else "scales rotary frequencies"
        raise InputError(f"{path} {what}, which is not read", hint="put the model's config.json beside the file")
    try:
        found: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    except Exception as error:  # of an architecture that it does not know, among others
        raise InputError(f"{path}: transformers makes no configuration of it: {first_line(error)}") from error
    size = own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"]
    if own.get("rope.dimension_count", size) != size or own.get("attention.value_length", size) != size:
        raise InputError(f"{path} turns parts of heads", hint="put the model's config.json beside the file")
    return found | {"head_dim": size}


def _model_config(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**{k: v for k, v in config.items() if k != "quantization_config"})
