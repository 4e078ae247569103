"""Second moments of a linear's input, and the triangular factor that GPTQ runs on.

H = X^T X / T over T calibration tokens, X [T, K]. One Hessian serves every linear that reads the same input.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.tensors.finite import all_finite

__all__ = ["Moments", "Statistics", "inverse_factor", "output_error"]

_TILES = 6  # triangle by tiles: (1 + 1/6) / 2 = 58% of a full product, each still wide enough for the BLAS
_MIN_TILE = 128
_MAX_DAMP_DOUBLINGS = 12


class Moments:
    """X^T X (and, with a second stream F, F^T X) summed batch by batch in float32."""

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        """Zero moments of inputs with `columns` columns."""
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._cross: Tensor | None = None
        self._cross_tokens = 0
        self.tokens = 0

    @classmethod
    def summed(cls, sums: Tensor, tokens: int) -> "Moments":
        """From `sums` and `tokens` of others; the sums' memory is taken over."""
        found = cls.__new__(cls)
        found._sum, found._cross, found._cross_tokens, found.tokens = sums, None, 0, tokens
        return found

    @property
    def sums(self) -> Tensor:
        """[K, K] float32, of which the lower triangle counts."""
        return self._sum

    def add(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Adds tokens [..., K]; `reference` are the same tokens' inputs in the float model."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        for start, stop in self._tiles():  # lower triangle only: H is symmetric
            self._sum[start:, start:stop].addmm_(x[:, start:].T, x[:, start:stop])
        self.tokens += x.shape[0]
        if reference is not None:
            f = reference.reshape(-1, reference.shape[-1]).float()
            if self._cross is None:
                self._cross = torch.zeros_like(self._sum)
            self._cross.addmm_(f.T, x)
            self._cross_tokens += x.shape[0]

    def energies(self) -> Tensor:
        """Sum of squares of each input column, [K]."""
        return self._sum.diagonal()

    def matrix(self) -> Tensor:
        """H [K, K] float32, symmetric; in the sum's own memory, so that nothing can be added any more."""
        for start, stop in self._tiles():
            corner = self._sum[start:stop, start:stop]
            corner.copy_(corner.tril() + corner.tril(-1).T)
            self._sum[start:stop, stop:] = self._sum[stop:, start:stop].T
        return self._sum.div_(max(self.tokens, 1))

    def mean(self) -> Tensor:
        """H [K, K] float32 in memory of its own: several weights read it, and tokens may still be added."""
        whole = self._sum.tril()
        whole += whole.tril(-1).T
        return whole.div_(max(self.tokens, 1))

    def cross(self) -> Tensor | None:
        """F^T X / T [K, K] float32, where a reference was given with every token."""
        return self._cross / self.tokens if self._cross is not None and self._cross_tokens == self.tokens else None

    def _tiles(self) -> list[tuple[int, int]]:
        """Runs of columns, each of which is summed from its own first row down."""
        columns = self._sum.shape[0]
        step = max(_MIN_TILE, -(-columns // _TILES))
        return [(start, min(start + step, columns)) for start in range(0, columns, step)]


@dataclass
class Statistics:
    """What a rounder may know about the input of a linear."""

    hessian: Tensor
    """[K, K] float32, mean over tokens of x x^T."""
    tokens: int
    """Calibration tokens behind it."""
    held_out: Tensor | None = None
    """The same from tokens that no solver saw; they decide which of several results is kept."""
    held_out_tokens: int = 0
    """Tokens behind `held_out`."""
    cross: Tensor | None = None
    """[K, K] F^T X / T: inputs of the float model against those of the quantized one."""
    held_out_cross: Tensor | None = None
    """The same from held-out tokens."""
    cache: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    """Factors, shared by the linears that read this input."""

    def everything(self) -> "Statistics":
        """All tokens together, with nothing held out any more."""
        if self.held_out is None:
            return self
        total, held = self.tokens, self.held_out_tokens
        share = held / max(total + held, 1)

        def mixed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else a * (1 - share) + b * share

        hessian = mixed(self.hessian, self.held_out)
        assert hessian is not None
        return Statistics(hessian, total + held, cross=mixed(self.cross, self.held_out_cross))

    def scaled(self, scale: Tensor) -> "Statistics":
        """Of the same input divided by `scale` [K]."""
        outer = scale[:, None] * scale[None, :]

        def divided(matrix: Tensor | None) -> Tensor | None:
            return None if matrix is None else matrix / outer

        return Statistics(
            self.hessian / outer,
            self.tokens,
            held_out=divided(self.held_out),
            held_out_tokens=self.held_out_tokens,
            cross=divided(self.cross),
            held_out_cross=divided(self.held_out_cross),
        )

    def cached(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        """A derived matrix, made once for all linears that share this input."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


def inverse_factor(hessian: Tensor, damp_percent: float, order: Tensor | None = None) -> Tensor:
    """Upper U [K, K] with U^T U = (H + damp * mean(diag H) * I)^-1, without forming the inverse.

    H reversed in rows and columns is L L^T; the inverse of L, reversed back, is U: 2/3 K^3 operations where inverse and
    Cholesky take 4/3. Damping doubles until the factor exists, from 1e-6 where `damp_percent` is 0. At most two
    matrices of H's size exist beside it.

    Args:
        hessian: H [K, K].
        damp_percent: Share of the mean diagonal to begin with.
        order: [K] columns of H in the order of U's; default: as they are.

    Raises:
        InputError: H holds NaN or infinity, or no damping helps.
    """
    mean = hessian.diagonal().mean()
    if not all_finite(hessian):
        raise InputError("activations hold NaN or infinite values")
    order = torch.arange(hessian.shape[0], device=hessian.device) if order is None else order
    back = order.flip(0)
    damped = hessian.index_select(0, back).index_select(1, back)
    diagonal, damp = damped.diagonal().clone(), damp_percent
    for _ in range(_MAX_DAMP_DOUBLINGS):
        damped.diagonal().copy_(diagonal + damp * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and all_finite(lower):
            del damped
            _invert_lower(lower)
            upper: Tensor = lower.flip(0, 1)
            return upper
        damp = max(2 * damp, 1e-6)
    raise InputError(f"the Hessian cannot be factored, even with damping {damp:.3g}", hint="give more calibration text")


def _invert_lower(lower: Tensor, base: int = 256) -> None:
    """Inverts a lower triangular matrix in place, by halves: matrix products instead of a solve against I."""
    size = lower.shape[0]
    if size <= base:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = size // 2
    first, last, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_lower(first, base)
    _invert_lower(last, base)
    below.copy_(-(last @ (below @ first)))


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor | None = None) -> float:
    """tr((W-Q) H (W-Q)^T) / tr(W H W^T): the relative squared error of the layer's output; of W itself without H."""
    difference = weight - quantized
    if hessian is None:
        reference, error = float(weight.square().sum()), float(difference.square().sum())
    else:
        reference = float(((weight @ hessian) * weight).sum())
        error = float(((difference @ hessian) * difference).sum())
    return error / reference if reference > 0 else 0.0
