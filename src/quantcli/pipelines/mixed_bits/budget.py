"""What `--target-size` and `--target-bits` leave to spend, and what was chosen to spend it on.

Bits per weight are stored bits of all quantized weights, scales and zero points included: the figure that runs report.
A size is that of the written safetensors files, float tensors and headers included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TOLERANCE", "Budget", "Choice"]

TOLERANCE = 0.01
"""How far below the target a result may end."""


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
