"""Bytes of the written weights, and how they follow from the bits of each linear."""

from collections.abc import Mapping
from dataclasses import replace

from quantcli.pipelines.mixed_bits.budget import Choice
from quantcli.pipelines.planning.plan import Plan

__all__ = ["with_bits", "with_choice", "written_bytes"]


def written_bytes(plan: Plan) -> int:
    """What the weights take as they are planned."""
    total = sum(t.stored_bytes for t in plan.targets.values())
    total += plan.embedding.stored_bytes if plan.embedding else 0
    for name, entry in plan.checkpoint.entries.items():
        if name not in plan.replaced:
            count = entry.size_bytes // entry.dtype.itemsize
            total += count * (plan.float_dtype(entry.dtype) if entry.dtype.is_floating_point else entry.dtype).itemsize
    return total


def with_bits(plan: Plan, bits: Mapping[str, int]) -> Plan:
    """The plan with other bits, by linear; its size is left as it was."""
    packed = plan.codec.packed_bytes
    targets = {}
    for name, target in plan.targets.items():
        scheme = replace(target.scheme, bits=bits[name])
        size = target.stored_bytes if packed is None else packed(target.rows, target.columns, scheme)
        targets[name] = replace(target, scheme=scheme, stored_bytes=size)
    return replace(plan, targets=targets)


def with_choice(plan: Plan, choice: Choice) -> Plan:
    """The plan with the bits that were chosen; the commonest width becomes that of the whole model."""
    plan = with_bits(plan, choice.bits)
    commonest = max(choice.distribution(), key=lambda part: (part["linears"], part["bits"]))["bits"]
    plan = replace(plan, choice=choice, default=replace(plan.default, bits=commonest))
    return replace(plan, size_bytes=written_bytes(plan))
