"""How a language model draws its next token."""

from dataclasses import dataclass

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float
    """Logits are divided by it; above 0."""
    top_p: float = 1.0
    """Share of probability that the tokens drawn from have together."""
    seed: int = 0
    """The same seed gives the same tokens on the same runtime."""
