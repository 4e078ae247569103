"""Which widths may be mixed, what every linear takes at each, and whether that can meet the target."""

from dataclasses import replace

import torch

from quantcli.errors import UsageError
from quantcli.formats.codec import Codec, Held
from quantcli.formats.codecs import CODECS
from quantcli.formats.readers import READERS
from quantcli.models.writer import FILE_BYTES
from quantcli.options import MIXED_BITS
from quantcli.pipelines.mixed_bits.budget import TOLERANCE, Budget
from quantcli.pipelines.planning.plan import Plan
from quantcli.pipelines.planning.target import Target
from quantcli.pipelines.planning.targets import held_as, is_expert
from quantcli.scheme import Scheme
from quantcli.tensors.affine import minmax_grid, round_to_grid

__all__ = ["holds_mixed", "make_budget"]

_FILE_HEADER = 64  # its length, the metadata and the padding of a safetensors file


def make_budget(plan: Plan) -> Budget:
    """Checks a target against what algorithm and format can do.

    Raises:
        UsageError: a target out of reach, a format with one width, widths that cannot be made.
    """
    options = plan.options
    in_bytes = options.target_size is not None
    flag = "--target-size" if in_bytes else "--target-bits"
    if in_bytes and plan.codec.packed_bytes is None:
        raise UsageError(
            f"format {options.format} stores floats, whose size does not depend on the bits",
            hint="use --target-bits, or --format gptq",
        )
    widths = _widths(plan)
    fixed = {name for name in plan.targets if any(o.bits is not None for o in options.matching(name))}
    if len(fixed) == len(plan.targets):
        raise UsageError(f"--override says the bits of every linear, {flag} has nothing to choose")
    sizes = {
        name: {
            bits: _size(target, replace(target.scheme, bits=bits), plan.codec, in_bytes)
            for bits in ((target.scheme.bits,) if name in fixed else widths)
        }
        for name, target in plan.targets.items()
    }
    embedding = plan.embedding
    weights = sum(t.rows * t.columns for t in [*plan.targets.values(), *([embedding] if embedding else [])])
    if in_bytes:
        rest = plan.size_bytes - sum(t.stored_bytes for t in plan.targets.values()) + _header_bytes(plan)
        target = float(options.target_size or 0)
    else:
        rest = _size(embedding, embedding.scheme, plan.codec, False) if embedding else 0
        target = float(options.target_bits or 0)
    budget = Budget(in_bytes, target, widths, sizes, rest, weights)
    low, high = budget.reachable
    if not low <= target or high < target * (1 - TOLERANCE):
        named = ", ".join(map(str, widths))
        raise UsageError(
            f"{flag} {budget.words(target)} is out of reach: with {named} bits, {budget.words(low, high)} "
            "can be reached",
            hint=f"give a {flag} in that range, other --mixed-bits, or another --group-size",
        )
    return budget


def _widths(plan: Plan) -> tuple[int, ...]:
    """Bits to choose from: those given, or what algorithm and format can do of the usual ones."""
    options, algorithm = plan.options, plan.algorithm
    why = {bits: _refusal(plan, bits) for bits in options.mixed_bits or MIXED_BITS}
    refused = {bits: reason for bits, reason in why.items() if reason is not None}
    if options.mixed_bits and refused:
        bits, reason = next(iter(refused.items()))
        raise UsageError(f"{bits} bits cannot be mixed in: {reason}", hint="give other --mixed-bits")
    widths = tuple(sorted(bits for bits in why if bits not in refused))
    if len(widths) < 2:
        reason = next(iter(refused.values()))
        able = [n for n, c in CODECS.items() if n != options.format and holds_mixed(c) and n in algorithm.formats]
        one = len(set(algorithm.bits) & set(MIXED_BITS)) < 2
        hint = "name another algorithm" if one or not able else f"use --format {' or '.join(able)}"
        raise UsageError(f"widths cannot be mixed: {reason}", hint=hint)
    return widths


def holds_mixed(codec: Codec) -> bool:
    """Whether a format holds linears of several widths."""
    return all(codec.why_not(Held(32, 128, Scheme(bits, 32), False, True)) is None for bits in (4, 8))


def _refusal(plan: Plan, bits: int) -> str | None:
    """Why linears cannot have that width next to others."""
    for algorithm in (*(step.algorithm for step in plan.transforms), plan.algorithm):
        if bits not in algorithm.bits:
            return f"{algorithm.name} makes {', '.join(map(str, algorithm.bits))} bits"
    for name in plan.options.readers:
        takes = READERS[name].formats[plan.codec.name]
        if bits not in takes.bits:
            return f"{name} takes {', '.join(map(str, takes.bits))} bits"
    for target in plan.targets.values():
        other = replace(target, scheme=replace(target.scheme, bits=bits))
        held = held_as(other, plan.settings, default=False, expert=is_expert(target, plan.skeleton))
        if (reason := plan.codec.why_not(held)) is not None:
            return f"format {plan.codec.name} cannot hold {target.name}: {reason}"
    return None


def _size(target: Target, scheme: Scheme, codec: Codec, in_bytes: bool) -> int:
    if in_bytes and codec.packed_bytes is not None:
        return codec.packed_bytes(target.rows, target.columns, scheme)
    return round(target.rows * target.columns * scheme.bits_per_weight(target.columns))


def _header_bytes(plan: Plan) -> int:
    """What the headers of the written files take, to within a few bytes per tensor: a tenth of a tiny model."""
    digits = len(str(plan.size_bytes))
    replaced = [*plan.targets.values(), *([plan.embedding] if plan.embedding else [])]
    written = {t.disk for t in replaced}
    total = _FILE_HEADER * (1 + plan.size_bytes // FILE_BYTES)
    for name, entry in plan.checkpoint.entries.items():
        if name not in written:
            total += _entry_bytes(name, list(entry.shape), digits)
    for target in replaced:
        codec = CODECS["gptq"] if target is plan.embedding else plan.codec
        zeros = torch.zeros(32, 128)
        parts = codec.pack(round_to_grid(zeros, *minmax_grid(zeros, target.scheme), target.scheme))
        total += sum(
            _entry_bytes(f"{target.stem}.{part}", [target.rows, target.columns][: tensor.ndim], digits)
            for part, tensor in parts.items()
        )
    return total


def _entry_bytes(name: str, shape: list[int], digits: int) -> int:
    # BF16, which has a letter more, is found in models of a size where letters do not count
    text = f'"{name}":{{"dtype":"F32","shape":[{",".join(map(str, shape))}],"data_offsets":[,]}},'
    return len(text.encode()) + 2 * digits
