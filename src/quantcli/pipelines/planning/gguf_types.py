"""A GGUF plan: which mix of types was meant, and the type of every tensor in it."""

from dataclasses import replace
from typing import Any

from quantcli.errors import InputError, UsageError
from quantcli.models.gguf.families import family_of, notes
from quantcli.models.gguf.mixes import MIXES, MixedModel, fitting, wanted_type
from quantcli.models.gguf.names import tensors_of
from quantcli.models.gguf.planned import GgufPlan
from quantcli.models.gguf.vocabulary import read_vocabulary
from quantcli.options import QuantizeOptions
from quantcli.pipelines.planning.opening import FloatModel
from quantcli.tensors.block_types import BLOCK_TYPES

__all__ = ["plan_gguf", "resolve_gguf"]

_BY_BITS = {2: "q2_k", 3: "q3_k_m", 4: "q4_k_m", 5: "q5_k_m", 6: "q6_k", 8: "q8_0"}
_SYMMETRIC = {4: "q4_0", 5: "q5_0"}
_OVERRIDES = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"}


def resolve_gguf(options: QuantizeOptions) -> QuantizeOptions:
    """The options with format, mix and grid made to agree, where a GGUF file is meant.

    Raises:
        UsageError: flags that contradict each other, or that a mix leaves no room for.
    """
    meant = options.gguf_type is not None or (options.format is None and "llama.cpp" in options.readers)
    if options.format not in (None, "gguf") and options.gguf_type is not None:
        raise UsageError(f"--gguf-type is a choice of --format gguf, not of {options.format}", hint="leave one out")
    if options.format != "gguf" and not meant:
        return options
    if options.mixes:
        raise UsageError("a GGUF file has its own mixes of types, none to a target", hint="choose one by --gguf-type")
    bits = options.weight_bits if options.gguf_type is None else options.bits
    mix = options.gguf_type or _usual(options.weight_bits, options.symmetric)
    kind = BLOCK_TYPES[MIXES[mix]]
    for flag, given, own in (
        ("--bits", bits, kind.bits),
        ("--group-size", options.group_size, kind.group),
        ("--sym" if options.symmetric else "--asym", options.symmetric, kind.symmetric),
    ):
        if given is not None and given != own:
            what = flag if isinstance(given, bool) else f"{flag} {given}"
            grid = f"{kind.bits} bits, groups of {kind.group}, {'symmetric' if kind.symmetric else 'asymmetric'}"
            raise UsageError(f"{what} does not go with GGUF's {mix}: {grid}", hint="choose by --gguf-type")
    return replace(
        options, format="gguf", gguf_type=mix, bits=kind.bits, group_size=kind.group, symmetric=kind.symmetric
    )


def plan_gguf(options: QuantizeOptions, model: FloatModel) -> GgufPlan:
    """The type of every tensor; what llama.cpp cannot open, or would compute otherwise, is refused.

    Args:
        options: Resolved, without patterns that name nothing.
        model: What is quantized.

    Raises:
        InputError: the model or its tokenizer are not llama.cpp's.
        UsageError: overrides that a GGUF file cannot hold.
    """
    assert options.gguf_type is not None
    config = model.skeleton.config.get_text_config()
    family = family_of(config)
    tied = model.layout.tied and not options.quantize_lm_head
    if model.online is not None:
        raise InputError("llama.cpp computes no rotations at run time", hint="leave --set online=true out")
    tensors = tensors_of(model.skeleton, family, head=None if tied else model.layout.head)
    vocabulary = read_vocabulary(model.folder, config.vocab_size)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    llama = family.architecture == "llama"
    facts = MixedModel(config.num_hidden_layers, heads, groups, experts, llama, tied)
    types: dict[str, str] = {}
    moved: dict[str, list[str]] = {}
    quantized = {*model.layout.linears, model.layout.embedding, *([] if tied else [model.layout.head])}
    for tensor in tensors:
        paths = [source.removesuffix(".weight") for source in tensor.sources]
        if paths[0] not in quantized:
            continue
        columns = _columns(model.skeleton, paths[0])
        wanted = _overridden(options, paths) or wanted_type(options.gguf_type, tensor.name, facts)
        found = fitting(wanted, columns)
        if found is None:
            moved.setdefault(f"rows of {columns} fit no block: left float", []).append(tensor.name)
            continue
        if found != wanted:
            moved.setdefault(f"rows of {columns} are no blocks of 256: {found} in place of {wanted}", []).append(
                tensor.name
            )
        types |= dict.fromkeys(paths, found)
    said = [f"{why} in {len(names)} tensors, as {names[0]}" for why, names in moved.items()]
    return GgufPlan(tuple(tensors), types, vocabulary, (*notes(config, family), *vocabulary.notes, *said))


def _usual(bits: int, symmetric: bool | None) -> str:
    if symmetric and bits in _SYMMETRIC:
        return _SYMMETRIC[bits]
    if bits not in _BY_BITS:
        raise UsageError(f"GGUF has no type of {bits} bits", hint=f"use --bits {', '.join(map(str, _BY_BITS))}")
    return _BY_BITS[bits]


def _overridden(options: QuantizeOptions, paths: list[str]) -> str | None:
    """The type that overrides name for a tensor; of experts, for all of them alike."""
    found = set()
    for path in paths:
        bits = None
        for override in options.matching(path):
            if set(override.scheme) - {"bits"}:  # clip_ratio is the rounder's affair
                raise UsageError(
                    f"--override {override.pattern}: GGUF's types have their own groups and zero points",
                    hint="override bits alone",
                )
            bits = override.scheme.get("bits", bits)
        found.add(bits)
    if len(found) > 1:
        raise UsageError(f"experts are one tensor in a GGUF file, {paths[0]} and others differ in --override")
    (bits,) = found
    if bits is None:
        return None
    if bits not in _OVERRIDES:
        raise UsageError(f"GGUF has no type of {bits} bits", hint=f"use {', '.join(map(str, _OVERRIDES))}")
    return _OVERRIDES[bits]


def _columns(skeleton: Any, path: str) -> int:
    from quantcli.models.layout import is_linear, weight_shape

    module = skeleton.get_submodule(path)
    return int(weight_shape(module)[1] if is_linear(module) else module.weight.shape[1])
