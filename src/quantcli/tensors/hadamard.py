"""Orthogonal matrices that spread a vector over all of its entries: Hadamard matrices and random rotations.

A Hadamard matrix of order n has entries +1 and -1 and orthogonal rows; n is 1, 2 or a multiple of 4. They are built by
factors: H of order a times H of order b is one of order a b (Sylvester), and q + 1 or 2 (q + 1) come from the quadratic
residues of a prime q (Paley, 1933). That covers the hidden sizes of real models; where it does not (orders 52, 92 and
100 are the first), the odd part gets a random rotation instead.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rotation", "hadamard_factors", "make_rotation"]

_LARGEST_POWER = 64  # larger powers of two are applied as two factors: fewer operations than one product


@dataclass(frozen=True)
class Rotation:
    """Q = diag(signs) (A x B x ...), orthogonal, kept by its Kronecker factors."""

    factors: tuple[Tensor, ...]
    """Orthogonal matrices, float64 unless cast by `to`."""
    signs: Tensor
    """[size] of +1 and -1, of the same dtype."""

    @classmethod
    def identity(cls, size: int) -> "Rotation":
        """The rotation that does nothing."""
        return cls((), torch.ones(size, dtype=torch.float64))

    @property
    def size(self) -> int:
        """Order of Q."""
        return len(self.signs)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Rotation":
        """The same rotation, computed in another dtype: where a model runs, float64 is not wanted."""
        return Rotation(tuple(f.to(device, dtype) for f in self.factors), self.signs.to(device, dtype))

    def rows(self, x: Tensor) -> Tensor:
        """X Q for x [..., size]; in the rotation's dtype."""
        out = x.to(self.signs.dtype) * self.signs.to(x.device)
        shape, after = out.shape, self.size
        for factor in self.factors:
            after //= len(factor)
            parts = out.reshape(-1, len(factor), after)
            out = torch.einsum("nka,kj->nja", parts, factor.to(x.device))
        return out.reshape(shape)

    def columns(self, x: Tensor) -> Tensor:
        """Q^T x for x [size, ...]; in the rotation's dtype."""
        return self.rows(x.movedim(0, -1)).movedim(-1, 0)

    def matrix(self) -> Tensor:
        """Q [size, size] in the rotation's dtype."""
        return self.rows(torch.eye(self.size, dtype=torch.float64))


def make_rotation(size: int, mode: str, seed: int) -> Rotation:
    """A rotation of any order.

    Args:
        size: Its order.
        mode: hadamard: a Hadamard matrix after random signs; random: uniform over all rotations.
        seed: Of the signs or the rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    if mode == "random":
        return Rotation((_random_orthogonal(size, generator),), torch.ones(size, dtype=torch.float64))
    signs = torch.randint(2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    return Rotation(tuple(f / len(f) ** 0.5 for f in hadamard_factors(size, generator)), signs)


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """[size, size] float64, uniform over the orthogonal group (https://arxiv.org/abs/math-ph/0609050)."""
    gauss = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gauss)
    out: Tensor = q * r.diagonal().sign()
    return out


def hadamard_factors(size: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Matrices of +1 and -1 whose Kronecker product is a Hadamard matrix of order `size`.

    Args:
        size: The order.
        generator: For the odd part of an order that is not known: it becomes a random rotation with rows of the right
            length. Without one, such an order is refused.

    Raises:
        ValueError: no Hadamard matrix of this order is known here.
    """
    twos = size & -size
    odd = size // twos
    if odd == 1:
        return _sylvester(size)
    for factor in (4, 8, 16, 32):
        found = _paley(odd * factor) if twos % factor == 0 else None
        if found is not None:
            return [found, *_sylvester(twos // factor)]
    if generator is None:
        raise ValueError(f"no Hadamard matrix of order {size} is known here")
    return [_random_orthogonal(odd, generator) * odd**0.5, *_sylvester(twos)]


def _sylvester(size: int) -> list[Tensor]:
    """Factors of a power of two."""
    if size > _LARGEST_POWER:
        return [*_sylvester(_LARGEST_POWER), *_sylvester(size // _LARGEST_POWER)]
    out = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(out) < size:
        out = torch.kron(out, two)
    return [out]


def _paley(order: int) -> Tensor | None:
    """By the quadratic residues of a prime: order q + 1 with q = 3 mod 4, or 2 (q + 1) with q = 1 mod 4."""
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        core = _bordered(order - 1, -1.0)
        return core + torch.eye(order, dtype=torch.float64)
    q = order // 2 - 1
    if order % 4 == 0 and _is_prime(q) and q % 4 == 1:
        core, eye = _bordered(q, 1.0), torch.eye(q + 1, dtype=torch.float64)
        sum_part = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        eye_part = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, sum_part) + torch.kron(eye, eye_part)
    return None


def _bordered(q: int, corner: float) -> Tensor:
    """[q + 1, q + 1]: zero corner, a row of ones, a column of `corner`, and the Jacobsthal matrix chi(i - j)."""
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0.0 if d == 0 else 1.0 if d in squares else -1.0 for d in range(q)], dtype=torch.float64)
    index = torch.arange(q)
    out = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    out[0, 1:], out[1:, 0] = 1.0, corner
    out[1:, 1:] = chi[(index[:, None] - index[None, :]) % q]
    return out


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
