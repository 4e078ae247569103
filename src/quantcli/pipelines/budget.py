"""What `--target-size` and `--target-bits` leave to spend, and what every linear takes at every width.

Bits per weight are stored bits of all quantized weights, scales and zero points included: the figure that runs report.
A size is that of the written safetensors files, float tensors and headers included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from quantcli.errors import UsageError
from quantcli.formats import CODECS
from quantcli.formats.codec import Codec, Held
from quantcli.models.experts import Expert
from quantcli.options import MIXED_BITS
from quantcli.scheme import Scheme
from quantcli.tensors.affine import minmax_grid, round_to_grid

if TYPE_CHECKING:
    from quantcli.pipelines.plan import Plan, Target

__all__ = ["TOLERANCE", "Budget", "Choice", "held_as", "make_budget"]

TOLERANCE = 0.01
"""How far below the target a result may end."""
_SHARD_HEADER = 64  # its length, the metadata and the padding of a safetensors file


@dataclass(frozen=True)
class Budget:
    """What may be spent on the quantized linears, in bits or bytes."""

    in_bytes: bool
    """Whether a size was asked for, not an average."""
    target: float
    """As asked for: bytes, or bits per weight."""
    widths: tuple[int, ...]
    """Bits that may be chosen."""
    sizes: Mapping[str, Mapping[int, int]]
    """By linear and width, bytes or bits; those that `--override` fixes have one width."""
    rest: int
    """Bytes or bits of all that is not chosen here."""
    weights: int
    """Quantized weights, those of a quantized embedding included."""

    @property
    def limit(self) -> int:
        """What the linears may take."""
        return int(self.target * (1 if self.in_bytes else self.weights)) - self.rest

    @property
    def lowest(self) -> int:
        """What they must take to end within the tolerance."""
        if self.in_bytes:  # headers are estimated from above
            return max(0, int(self.target * (1 - 0.8 * TOLERANCE)) - self.rest)
        return max(0, int(self.target * self.weights * (1 - TOLERANCE)) + 1 - self.rest)

    @property
    def fixed(self) -> list[str]:
        """Linears whose width is not chosen."""
        return [name for name, sizes in self.sizes.items() if len(sizes) == 1]

    @property
    def reachable(self) -> tuple[float, float]:
        """The smallest and the largest target that can be met."""
        return self._figure(sum(min(s.values()) for s in self.sizes.values())), self._figure(
            sum(max(s.values()) for s in self.sizes.values())
        )

    def achieved(self, bits: Mapping[str, int]) -> float:
        """What a choice comes to, in the unit of the target."""
        return self._figure(sum(self.sizes[name][b] for name, b in bits.items()))

    def words(self, *values: float) -> str:
        """A figure, or a range, as people read it."""
        numbers = " to ".join(f"{value / 1e6:.4g}" if self.in_bytes else f"{value:.3f}" for value in values)
        return numbers + (" MB" if self.in_bytes else " stored bits per weight")

    def summary(self) -> str:
        """The target and what can be reached, for people."""
        low, high = self.reachable
        fixed = f", {len(self.fixed)} linears fixed by --override" if self.fixed else ""
        return f"at most {self.words(self.target)}{fixed} ({self.words(low, high)} can be reached)"

    def to_dict(self, choice: "Choice | None") -> dict[str, Any]:
        """For machines."""
        values = {
            "unit": "bytes" if self.in_bytes else "bits per weight",
            "target": self.target,
            "reachable": list(self.reachable),
            "widths": list(self.widths),
        }
        if choice is None:
            return values
        return values | {
            "achieved": self.achieved(choice.bits),
            "expected_kl": choice.expected_kl,
            "measured_tokens": choice.tokens,
            "measured_seconds": round(choice.seconds, 1),
            "distribution": choice.distribution(),
            "groups": [list(names) for names in choice.groups],
            "linears": {
                name: {"bits": bits, "fixed": name in self.fixed, "expected_kl": dict(choice.costs[name])}
                for name, bits in choice.bits.items()
            },
        }

    def choice_rows(self, choice: "Choice") -> list[tuple[str, str]]:
        """What was chosen, for people."""
        achieved = self.achieved(choice.bits)
        short = "" if achieved >= self.target * (1 - TOLERANCE) else "; no choice comes closer"
        return [
            *(
                (f"{part['bits']} bits", f"{part['linears']} linears, {part['share']:.1%} of their weights")
                for part in choice.distribution()
            ),
            ("together", self.words(achieved) + short),
            ("expected KL", f"{choice.expected_kl:.4f} nats per token"),
            ("measured in", f"{choice.seconds:.0f} s on {choice.tokens} tokens"),
        ]

    def _figure(self, spent: int) -> float:
        return float(spent + self.rest) if self.in_bytes else (spent + self.rest) / self.weights


@dataclass(frozen=True)
class Choice:
    """Which linear gets how many bits, and why."""

    bits: Mapping[str, int]
    """By linear, those included that were not free."""
    costs: Mapping[str, Mapping[int, float]]
    """By linear and width, the KL divergence that rounding it is expected to cause, in nats per token."""
    groups: Sequence[Sequence[str]]
    """Linears that share their bits."""
    counts: Mapping[str, int]
    """Weights of each linear."""
    tokens: int
    """On how many the costs were measured."""
    seconds: float
    """What measuring took."""

    @property
    def expected_kl(self) -> float:
        """Of the whole choice, as if the linears' effects added up."""
        return sum(self.costs[name][bits] for name, bits in self.bits.items())

    def distribution(self) -> list[dict[str, Any]]:
        """By width: linears, and their share of the weights."""
        total = sum(self.counts.values())
        found: dict[int, list[int]] = {}
        for name, bits in self.bits.items():
            found.setdefault(bits, []).append(self.counts[name])
        return [
            {"bits": bits, "linears": len(counts), "share": sum(counts) / total}
            for bits, counts in sorted(found.items())
        ]


def held_as(target: "Target", settings: Any, *, default: bool, expert: bool) -> Held:
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


def make_budget(plan: "Plan") -> Budget:
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


def _widths(plan: "Plan") -> tuple[int, ...]:
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
        able = [n for n, c in CODECS.items() if n != options.format and _mixes(c) and n in algorithm.formats]
        one = len(set(algorithm.bits) & set(MIXED_BITS)) < 2
        hint = "name another algorithm" if one or not able else f"use --format {' or '.join(able)}"
        raise UsageError(f"widths cannot be mixed: {reason}", hint=hint)
    return widths


def _mixes(codec: Codec) -> bool:
    """Whether a format holds linears of several widths."""
    return all(codec.why_not(Held(32, 128, Scheme(bits, 32), False, True)) is None for bits in (4, 8))


def _refusal(plan: "Plan", bits: int) -> str | None:
    """Why linears cannot have that width next to others."""
    for algorithm in (*(step.algorithm for step in plan.transforms), plan.algorithm):
        if bits not in algorithm.bits:
            return f"{algorithm.name} makes {', '.join(map(str, algorithm.bits))} bits"
    for target in plan.targets.values():
        expert = isinstance(plan.skeleton.get_submodule(target.name.rpartition(".")[0]), Expert)
        other = replace(target, scheme=replace(target.scheme, bits=bits))
        held = held_as(other, plan.settings, default=False, expert=expert)
        if (reason := plan.codec.why_not(held)) is not None:
            return f"format {plan.codec.name} cannot hold {target.name}: {reason}"
    return None


def _size(target: "Target", scheme: Scheme, codec: Codec, in_bytes: bool) -> int:
    if in_bytes and codec.packed_bytes is not None:
        return codec.packed_bytes(target.rows, target.columns, scheme)
    return round(target.rows * target.columns * scheme.bits_per_weight(target.columns))


def _header_bytes(plan: "Plan") -> int:
    """What the headers of the written files take, to within a few bytes per tensor: a tenth of a tiny model."""
    digits = len(str(plan.size_bytes // len(plan.layout.blocks)))
    replaced = [*plan.targets.values(), *([plan.embedding] if plan.embedding else [])]
    written = {t.disk for t in replaced}
    total = _SHARD_HEADER * (len(plan.layout.blocks) + 1)
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
