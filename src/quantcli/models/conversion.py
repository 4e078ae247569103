"""A checkpoint seen as its model has it: names and matrices through transformers' own tables of weight conversions.

Files may name a tensor otherwise than the model's class, keep what it has in one piece apart, or the other way round.
What `from_pretrained` would read is found with the tables that it reads by; what a tensor is made of is noted, so that
what stays as it was is written back as it stood.
"""

import math
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from quantcli.errors import InputError, first_line
from quantcli.models.checkpoint import Checkpoint, TensorEntry
from quantcli.models.experts import Stacked

__all__ = ["ModelTensors", "as_in_model", "expert_names", "find_sources"]

# tensors that old checkpoints carry and that models compute themselves
_LEGACY = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias)$")


@dataclass
class _Group:
    """Tensors of the files that a converter makes tensors of the model from."""

    converter: Any
    collected: dict[str, list[str]] = field(default_factory=dict)
    """Names on disk by the pattern that they matched."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all its tensors on disk."""
        return tuple(name for names in self.collected.values() for name in names)


@dataclass
class Sources:
    """Where a model's tensors come from."""

    direct: dict[str, str]
    """Names on disk by the model's."""
    groups: dict[str, _Group]
    """By the first name in the model that a group makes."""
    unknown: list[str]
    """Names on disk that are nothing in the model."""


def find_sources(model: Any, stored: Iterable[str]) -> Sources:
    """Finds what each tensor on disk is in a model.

    Args:
        model: A skeleton; experts that were taken apart count as what they were, too.
        stored: Names on disk.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    apart = model.state_dict()
    whole = apart | {stack.name: None for stack in model.stacked.values()}
    known: Mapping[str, Any] = dict.fromkeys(whole, True)
    sources, prefix = Sources({}, {}, []), model.base_model_prefix
    for disk in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(disk, renamings, converters, prefix, known)
        if name not in known:
            pattern = None
            name, _ = rename_source_key(disk, [], [], prefix, known)
        if name not in known:
            sources.unknown.append(disk)
        elif pattern is None:
            sources.direct[name] = disk
        else:
            group = sources.groups.setdefault(name, _Group(deepcopy(by_pattern[pattern])))
            group.collected.setdefault(pattern, []).append(disk)
    return sources


def expert_names(model: Any) -> dict[str, tuple[str, ...]]:
    """What files call the matrices of one expert, by the path of the parameter that holds all of them."""
    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    found: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim != 3:
            continue
        for converter in converters:
            target = converter.target_patterns[0].lstrip(".")
            if _lists_experts(converter) and len(converter.target_patterns) == 1 and name.endswith(target):
                leaves = tuple(p.removesuffix(".weight").rpartition(".")[2] for p in converter.source_patterns)
                found.setdefault(name, leaves)
    return found


def _lists_experts(converter: Any) -> bool:
    """Whether it stacks one matrix per expert, and at most puts two such stacks one after another."""
    first, *rest = converter.operations
    if not (isinstance(first, MergeModulelist) and first.dim == 0):
        return False
    return not rest or (len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1)


class ModelTensors(Checkpoint):
    """The tensors of a checkpoint, one by one as the model has them."""

    def __init__(self, base: Checkpoint, model: Any):
        """Use `as_in_model`."""
        super().__init__(base.folder, base.config, {})
        self._base, self._model = base, model
        self.names: dict[str, str] = {}
        """The name of each tensor here by the model's."""
        self.origins: dict[str, tuple[str, ...]] = {}
        self._pieces: dict[str, tuple[Stacked, str, TensorEntry]] = {}
        self._whole: dict[str, tuple[str, _Group, int]] = {}
        self._groups: dict[str, tuple[str, _Group]] = {}
        self._made: tuple[str, dict[str, Tensor]] = ("", {})
        sources = find_sources(model, base.entries)
        self.unknown = _not_ignored(model, sources.unknown)
        """Names on disk that are nothing in the model."""
        for name, disk in sources.direct.items():
            if name in model.stacked:
                self._take_apart(model.stacked[name], base.entries[disk], (disk,))
            else:
                self._add(name, disk, base.entries[disk])
        for name, group in sources.groups.items():
            self._add_group(name, group)
        for disk in sources.unknown:
            self.entries[disk] = base.entries[disk]
        head = model.get_output_embeddings()
        own = {name for name, module in model.named_modules() if module is head}
        for target, source in getattr(model, "all_tied_weights_keys", {}).items():
            # a tied head is the embedding's matrix read, but written under a name of its own
            if target not in self.names and source in self.names and target.rpartition(".")[0] not in own:
                self.names.setdefault(target, self.names[source])

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, as the model has it."""
        if name in self._groups:
            first, group = self._groups[name]
            return self._convert(first, group)[name]
        if name not in self._pieces:
            return self._base.read(name)
        stack, leaf, entry = self._pieces[name]
        if name in self._whole:
            first, group, expert = self._whole[name]
            matrix = self._convert(first, group)[first][expert]
        else:
            matrix = self.read_entry(name, entry)
        matrix = matrix.T if stack.transposed else matrix
        return matrix[stack.rows(leaf)].contiguous()

    def read_original(self, name: str) -> Tensor:
        """One tensor as it stands on disk."""
        return self._base.read(name)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return self._base.size_bytes

    def _add(self, name: str, disk: str, entry: TensorEntry) -> None:
        self.names[name] = disk
        self.entries[disk] = entry

    def _take_apart(self, stack: Stacked, entry: TensorEntry, origin: tuple[str, ...]) -> None:
        """A tensor that holds all experts: each is a run of bytes in the file."""
        if entry.shape != stack.shape:
            raise InputError(
                f"tensor {origin[0]} has shape {list(entry.shape)}, the configuration says {list(stack.shape)}"
            )
        size = entry.size_bytes // stack.shape[0]
        for expert in range(stack.shape[0]):
            start = entry.start + expert * size
            piece = replace(entry, shape=stack.shape[1:], start=start, stop=start + size)
            for leaf in stack.leaves:
                self._add_piece(stack, expert, leaf, piece, origin)

    def _add_piece(self, stack: Stacked, expert: int, leaf: str, entry: TensorEntry, origin: tuple[str, ...]) -> None:
        name = stack.weight(expert, leaf)
        rows = stack.rows(leaf)
        shape = rows.stop - rows.start, stack.shape[1 if stack.transposed else 2]
        size = entry.size_bytes // len(stack.leaves)
        self._pieces[name] = stack, leaf, entry
        self._add(name, name, replace(entry, shape=shape, stop=entry.start + size))
        self.origins[name] = origin

    def _add_group(self, name: str, group: _Group) -> None:
        stack = self._model.stacked.get(name)
        if stack is not None and _lists_experts(group.converter) and not stack.transposed:
            patterns = group.converter.source_patterns
            if len(patterns) == len(stack.leaves):
                for pattern, leaf in zip(patterns, stack.leaves, strict=True):
                    for expert, disk in enumerate(group.collected.get(pattern, ())):
                        if expert < stack.shape[0]:
                            self._add(stack.weight(expert, leaf), disk, self._base.entries[disk])
                return
        like = self._base.entries[group.names[0]]
        if stack is not None:
            entry = TensorEntry(like.file, like.dtype, stack.shape, 0, math.prod(stack.shape) * like.dtype.itemsize)
            self._take_apart(stack, entry, group.names)
            for expert in range(stack.shape[0]):
                self._whole |= {stack.weight(expert, leaf): (name, group, expert) for leaf in stack.leaves}
            return
        state = self._model.state_dict()
        first = group.converter.target_patterns[0]
        for pattern in group.converter.target_patterns:
            target = name.replace(first, pattern)
            if target not in state:
                continue
            shape = tuple(state[target].shape)
            self._add(
                target, target, TensorEntry(like.file, like.dtype, shape, 0, math.prod(shape) * like.dtype.itemsize)
            )
            self.origins[target] = group.names
            self._groups[target] = name, group

    def _convert(self, first: str, group: _Group) -> dict[str, Tensor]:
        """What a converter makes; the last result is kept, since its parts are read one after another."""
        if self._made[0] != first:
            converter = deepcopy(group.converter)
            for pattern, names in group.collected.items():
                for disk in names:
                    converter.add_tensor(first, disk, pattern, self._base.read(disk))
            try:
                made = converter.convert(first, model=self._model, config=self._model.config)
            except Exception as error:  # transformers' operations raise whatever torch does
                what = f"{self.folder}: {', '.join(group.names[:3])} cannot be made {first}"
                raise InputError(f"{what}: {first_line(error)}") from error
            self._made = first, {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
        return self._made[1]


def as_in_model(checkpoint: Checkpoint, model: Any) -> ModelTensors:
    """The checkpoint's tensors as a skeleton has them; the skeleton learns their names.

    Raises:
        InputError: a tensor that holds all experts has another shape than the configuration says.
    """
    tensors = ModelTensors(checkpoint, model)
    model.names_on_disk = tensors.names
    return tensors


def _not_ignored(model: Any, names: Iterable[str]) -> list[str]:
    ignored = [re.compile(p) for p in (getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    return [name for name in names if not _LEGACY.search(name) and not any(p.search(name) for p in ignored)]
