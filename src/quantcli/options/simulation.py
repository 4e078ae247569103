"""Numbers that a loaded model rounds its activations and its cache to."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from quantcli.errors import UsageError

__all__ = ["FLOAT_BITS", "SimulationOptions"]

FLOAT_BITS = 16


@dataclass(frozen=True)
class SimulationOptions:
    """Activations and KV cache as few bits would hold them, simulated when a model is evaluated."""

    a_bits: int = 16
    """Bits of what the blocks' linears are given, one grid per token, 2 to 8; 16 leaves it float."""
    k_bits: int = 16
    """Bits of cached keys, one grid per token and head, 2 to 8; 16 leaves them float."""
    v_bits: int = 16
    """Bits of cached values, one grid per token and head, 2 to 8; 16 leaves them float."""
    a_symmetric: bool = True
    """Symmetric or asymmetric grids for activations."""
    a_clip_ratio: float | None = None
    """Share of a token's range that its grid spans. Default: 0.9 below 8 bits, as in QuaRot; 1 at 8, where clipping
    costs more than it gains."""
    kv_symmetric: bool = False
    """Symmetric or asymmetric grids for keys and values."""
    kv_group_size: int = -1
    """Entries of a head that share a grid; -1 is the whole head."""
    kv_clip_ratio: float | None = None
    """Share of a head's range that its grid spans. Default: 0.95 below 8 bits, as in QuaRot; 1 at 8."""

    def __post_init__(self) -> None:
        for name in ("a_bits", "k_bits", "v_bits"):
            bits = getattr(self, name)
            if not 2 <= bits <= 8 and bits != FLOAT_BITS:
                raise UsageError(f"--{name.replace('_', '-')} must be 2 to 8, or 16 for none, got {bits}")
        for name in ("a_clip_ratio", "kv_clip_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 < ratio <= 1:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0 and at most 1, got {ratio:g}")
        if self.kv_group_size != -1 and self.kv_group_size < 2:
            raise UsageError(f"--kv-group-size must be 2 or more, or -1 for the head, got {self.kv_group_size}")
        self._refuse_idle("a", self.a_bits == FLOAT_BITS, "--a-bits")
        self._refuse_idle("kv", self.k_bits == self.v_bits == FLOAT_BITS, "--k-bits or --v-bits")

    @property
    def simulates(self) -> bool:
        """Whether anything is rounded."""
        return (self.a_bits, self.k_bits, self.v_bits) != (FLOAT_BITS,) * 3

    @property
    def activation_clip(self) -> float:
        """The share of a token's range that is used."""
        return _clip_ratio(self.a_clip_ratio, self.a_bits, 0.9)

    def cache_clip(self, bits: int) -> float:
        """The share of a head's range that is used for keys or values of so many bits."""
        return _clip_ratio(self.kv_clip_ratio, bits, 0.95)

    def resolved(self) -> dict[str, Any]:
        """Plain values of what is rounded, defaults filled in."""
        values = asdict(self)
        del values["kv_clip_ratio"]
        used: dict[str, tuple[int, float]] = {
            "a": (self.a_bits, self.activation_clip),
            "k": (self.k_bits, self.cache_clip(self.k_bits)),
            "v": (self.v_bits, self.cache_clip(self.v_bits)),
        }
        return values | {f"{n}_clip_ratio": None if b == FLOAT_BITS else clip for n, (b, clip) in used.items()}

    def describe(self) -> str:
        """What is rounded, in words."""
        parts = []
        if self.a_bits != FLOAT_BITS:
            kind = "sym" if self.a_symmetric else "asym"
            parts.append(f"activations {self.a_bits} bits {kind} per token, clip {self.activation_clip:g}")
        kind = "sym" if self.kv_symmetric else "asym"
        group = "head" if self.kv_group_size == -1 else f"{self.kv_group_size} entries of a head"
        for name, bits in (("keys", self.k_bits), ("values", self.v_bits)):
            if bits != FLOAT_BITS:
                parts.append(f"{name} {bits} bits {kind} per token and {group}, clip {self.cache_clip(bits):g}")
        return "; ".join(parts)

    def _refuse_idle(self, prefix: str, idle: bool, needed: str) -> None:
        """No flag without effect: a grid where nothing is rounded."""
        for spec in fields(self):
            grid = spec.name.startswith(prefix + "_") and not spec.name.endswith("_bits")
            if idle and grid and getattr(self, spec.name) != spec.default:
                flag = {"a_symmetric": "--a-asym", "kv_symmetric": "--kv-sym"}.get(
                    spec.name, "--" + spec.name.replace("_", "-")
                )
                raise UsageError(f"{flag} would have no effect without {needed}", hint=f"add {needed.split()[0]} 4")


def _clip_ratio(given: float | None, bits: int, few: float) -> float:
    return given if given is not None else few if bits < 8 else 1.0
