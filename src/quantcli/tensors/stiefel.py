"""Descent over orthogonal matrices: steps along the Stiefel manifold by the Cayley transform.

After Li et al. 2020, "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform"
(https://arxiv.org/abs/2002.01113). Symbols: X [n, n] orthogonal, G [n, n] the gradient at X, M the momentum, W skew.
The paper solves for the Cayley transform by two fixed-point iterations, which leave the manifold by a little at every
step; here the linear system is solved exactly, which costs next to nothing beside running a model.
"""

import torch
from torch import Tensor

__all__ = ["cayley_step", "nearest_orthogonal"]

_LARGEST_TURN = 1.0
"""Frobenius norm of a step's W: beyond it the linear model that the gradient is says nothing."""


def cayley_step(
    x: Tensor, gradient: Tensor, momentum: Tensor | None, *, learning_rate: float, beta: float
) -> tuple[Tensor, Tensor]:
    """One step of Cayley SGD with momentum (Algorithm 1 of the paper).

    Args:
        x: X [n, n] orthogonal, float64.
        gradient: G [n, n], the derivative of the loss by the entries of X.
        momentum: M [n, n] from the step before; None at the first.
        learning_rate: Longest step; it is shortened where it would turn X by more than norm 1.
        beta: Share of the momentum that stays.

    Returns:
        The new X, orthogonal to rounding, and the new M, which is tangent at the old X.
    """
    pushed = -gradient.double() if momentum is None else beta * momentum - gradient.double()
    half = pushed @ x.T
    half = half - 0.5 * (x @ (x.T @ half))
    skew = half - half.T
    alpha = min(learning_rate, _LARGEST_TURN / (float(skew.norm()) + 1e-8))
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    turned = torch.linalg.solve(eye - 0.5 * alpha * skew, x + 0.5 * alpha * (skew @ x))
    return turned, skew @ x


def nearest_orthogonal(x: Tensor) -> Tensor:
    """The orthogonal matrix nearest to an almost orthogonal X [n, n], by Newton and Schulz; float64."""
    x = x.double()
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(4):
        x = 0.5 * x @ (3 * eye - x.T @ x)
    return x
