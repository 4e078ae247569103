"""Which matrices are quantized, with which scheme each, and what the format cannot hold of that."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from quantcli.algorithms import KEEP_FLOAT, Algorithm, Step
from quantcli.errors import InputError, UsageError
from quantcli.formats import gptq
from quantcli.formats.codec import Codec, Held
from quantcli.formats.codecs import CODECS
from quantcli.models.experts import Expert
from quantcli.models.gguf.planned import GgufPlan
from quantcli.models.layout import is_transposed, weight_shape
from quantcli.models.skeleton import disk_name
from quantcli.options import QuantizeOptions
from quantcli.pipelines.planning.opening import FloatModel
from quantcli.pipelines.planning.plan import DTYPES
from quantcli.pipelines.planning.target import Target
from quantcli.scheme import PER_CHANNEL, Scheme
from quantcli.tensors.block_types import scheme_of

__all__ = [
    "EMBEDDING_SCHEME",
    "choose_zero_points",
    "find_embedding",
    "find_scaled",
    "find_targets",
    "held_as",
    "is_expert",
    "refuse_format",
    "refuse_unmatched",
]

EMBEDDING_SCHEME = Scheme(bits=8, group_size=64, lowest_zero=gptq.LOWEST_ZERO)
_INT8 = Scheme(bits=8, group_size=PER_CHANNEL, symmetric=True)
"""What scales are searched for where nobody rounds yet: weights as 8-bit kernels have them."""


def find_targets(
    options: QuantizeOptions,
    model: FloatModel,
    default: Scheme,
    algorithm: Algorithm,
    gguf: GgufPlan | None = None,
) -> dict[str, Target]:
    """The linears that are quantized, by module path.

    Args:
        options: With the format that was chosen.
        model: The linears' model.
        default: The scheme of those that `--override` does not name.
        algorithm: The rounder.
        gguf: The type of each tensor, where the format is GGUF.

    Raises:
        UsageError: patterns that name nothing or leave nothing, bits that the rounder does not make.
        InputError: a head that is not there, or a tensor.
    """
    checkpoint, skeleton, layout = model.checkpoint, model.skeleton, model.layout
    names = list(layout.linears)
    if options.quantize_lm_head:
        if layout.head is None:
            raise InputError(
                f"{type(skeleton).__name__} has no output head to quantize", hint="drop --quantize-lm-head"
            )
        names.append(layout.head)
    elif gguf is not None and layout.head is not None and layout.head in gguf.types:
        names.append(layout.head)
    if algorithm is KEEP_FLOAT:
        return {}
    used: set[str] = set()
    targets = {}
    for name in names:
        excluded = [p for p in options.exclude if re.search(p, name)]
        used.update(excluded)
        if excluded:
            continue
        used.update(override.pattern for override in options.matching(name))
        if gguf is None:
            scheme = _overridden(options, name, default, algorithm)
        elif name in gguf.types:
            scheme = scheme_of(gguf.types[name])
        else:
            continue
        module = skeleton.get_submodule(name)
        rows, columns = weight_shape(module)
        if gguf is None and columns < scheme.group_size and CODECS[options.format or ""].layout is None:
            scheme = replace(scheme, group_size=PER_CHANNEL)
        disk = source = disk_name(f"{name}.weight", skeleton, checkpoint.entries)
        embedding = disk_name(f"{layout.embedding}.weight", skeleton, checkpoint.entries)
        if name == layout.head and disk in (None, embedding):  # tied: read there, written under its own name
            disk, source = f"{name}.weight", embedding
        if disk is None or source is None:
            raise InputError(f"tensor {name}.weight is missing from {checkpoint.folder}")
        size = _stored_bytes(options, rows, columns, scheme, checkpoint.entries[source].dtype)
        clip_ratio = options.clip_ratio(name)
        targets[name] = Target(name, disk, rows, columns, is_transposed(module), scheme, size, clip_ratio)
    if gguf is not None:
        used.update(p for p in options.exclude if re.search(p, layout.embedding))
    for pattern in {*options.exclude, *(o.pattern for o in options.overrides)} - used:
        raise UsageError(f"no linear is named like {pattern!r}", hint="see the names with --dry-run --json")
    if not targets:
        raise UsageError("--exclude leaves nothing to quantize")
    return targets


def find_scaled(model: FloatModel) -> dict[str, Target]:
    """The linears of a model that stays float whose inputs may be scaled, by module path.

    Raises:
        InputError: the files lack one.
    """
    found = {}
    for name in model.layout.linears:
        module = model.skeleton.get_submodule(name)
        disk = disk_name(f"{name}.weight", model.skeleton, model.checkpoint.entries)
        if disk is None:
            raise InputError(f"tensor {name}.weight is missing from {model.checkpoint.folder}")
        size = model.checkpoint.entries[disk].size_bytes
        found[name] = Target(name, disk, *weight_shape(module), is_transposed(module), _INT8, size)
    return found


def refuse_unmatched(patterns: Sequence[str], targets: Mapping[str, Target]) -> None:
    """Refuses regular expressions that match no linear.

    Raises:
        UsageError: naming the first.
    """
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in targets):
            raise UsageError(f"no linear is named like {pattern!r}", hint="see the names with --dry-run --json")


def _overridden(options: QuantizeOptions, name: str, default: Scheme, algorithm: Algorithm) -> Scheme:
    scheme = default
    for override in options.matching(name):
        scheme = replace(scheme, **override.scheme)
    if scheme.bits not in algorithm.bits:
        raise UsageError(f"{algorithm.name} makes {algorithm.bits} bits, not {scheme.bits} as overridden for {name}")
    return scheme


def find_embedding(options: QuantizeOptions, model: FloatModel, gguf: GgufPlan | None = None) -> Target | None:
    """The embedding, where it is quantized; in a GGUF file it is, unless `--exclude` names it.

    Raises:
        InputError: the files lack it.
    """
    checkpoint, skeleton, layout = model.checkpoint, model.skeleton, model.layout
    scheme = EMBEDDING_SCHEME
    if gguf is not None:
        if layout.embedding not in gguf.types or any(re.search(p, layout.embedding) for p in options.exclude):
            return None
        scheme = scheme_of(gguf.types[layout.embedding])
    elif not options.quantize_embeddings:
        return None
    rows, columns = skeleton.get_submodule(layout.embedding).weight.shape
    disk = disk_name(f"{layout.embedding}.weight", skeleton, checkpoint.entries)
    if disk is None:
        raise InputError(f"tensor {layout.embedding}.weight is missing from {checkpoint.folder}")
    packed = CODECS["gptq" if gguf is None else "gguf"].packed_bytes
    assert packed is not None
    return Target(layout.embedding, disk, rows, columns, False, scheme, packed(rows, columns, scheme))


def _stored_bytes(options: QuantizeOptions, rows: int, columns: int, scheme: Scheme, stored: torch.dtype) -> int:
    packed = CODECS[options.format or ""].packed_bytes
    if packed is None:
        return rows * columns * DTYPES.get(options.dtype or "", stored).itemsize
    return packed(rows, columns, scheme)


def choose_zero_points(settings: Any, codec: Codec, targets: Mapping[str, Target]) -> Any:
    """The rounder's settings, its zero points chosen by the format where it leaves them open.

    Raises:
        UsageError: zero points were asked for that `--sym` fixes.
    """
    chosen = getattr(settings, "zero", None)
    if chosen is None or not targets:
        return settings
    fixed = all(target.scheme.symmetric for target in targets.values())
    if chosen == "float" and fixed:
        raise UsageError("--sym fixes the zero points, zero=float would have no effect", hint="leave one of them out")
    if chosen == "auto":
        return replace(settings, zero="float" if codec.float_zeros and not fixed else "integer")
    return settings


def held_as(target: Target, settings: Any, *, default: bool, expert: bool) -> Held:
    """What a format is asked to hold of a linear.

    Args:
        target: The linear.
        settings: The rounder's options.
        default: Whether its scheme is that of the whole model.
        expert: Whether it is one of many experts.
    """
    return Held(
        target.rows,
        target.columns,
        target.scheme,
        is_default=default,
        ordered=getattr(settings, "order", "") != "desc_act",
        float_zeros=getattr(settings, "zero", "") == "float" and not target.scheme.symmetric,
        transposed=target.transposed,
        expert=expert,
    )


def refuse_format(
    codec: Codec,
    options: QuantizeOptions,
    targets: Mapping[str, Target],
    default: Scheme,
    rounder: Step,
    model: FloatModel,
) -> None:
    """Refuses what the format cannot hold exactly, and names the formats that can.

    Args:
        codec: The format.
        options: What else was asked of it.
        targets: The linears that are quantized.
        default: The scheme of most of them.
        rounder: With its settings.
        model: The linears' model.

    Raises:
        UsageError: there is such a thing.
    """
    formats = rounder.algorithm.formats
    for target in targets.values():
        held = held_as(
            target, rounder.settings, default=target.scheme == default, expert=is_expert(target, model.skeleton)
        )
        why = codec.why_not(held)
        if why is None and target.name == model.layout.head and codec.name == "awq":
            why = "readers of it expect a float output head"
        if why is not None:
            others = [n for n in formats if n != codec.name and CODECS[n].why_not(held) is None]
            raise UsageError(
                f"format {codec.name} cannot hold {target.name}: {why}", hint=f"use --format {' or '.join(others)}"
            )
    if options.quantize_embeddings and codec.name not in ("gptq", "gguf"):
        hint = "use --format gptq" if "gptq" in formats else "leave --quantize-embeddings out"
        raise UsageError(f"format {codec.name} has no quantized embedding", hint=hint)


def is_expert(target: Target, skeleton: Any) -> bool:
    """Whether a linear is one of many experts."""
    return isinstance(skeleton.get_submodule(target.name.rpartition(".")[0]), Expert)
