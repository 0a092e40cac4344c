"""Edits inside the directions that retained tokens hardly use, and which directions these are.

::

    min_X  1/n sum_i |X c_i - (a_i - c_i)|^2 + alpha |X|^2,     X = X P,   X k = 0,       W <- W (I + X)

    X = (S_at - S_tt) P (I - M0 K (K^T P M0 K + lambda2 I)^-1 K^T P) M0,       M0 = (S_tt P + alpha I)^-1
    S_tt = 1/n sum_i c_i c_i^T,   S_at = 1/n sum_i a_i c_i^T

P projects onto the directions in which the mean Gram matrix of retained rows is below a threshold, K holds
invariants k. All in float64. As P^2 = P, with rows C U of coordinates in a basis U of that space::

    C P M0 = (C U U^T C^T / n + alpha I)^-1 C U U^T

which solves for as many unknowns as there are rows, and keeps X in factors of that rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pumice.erase.closed_form import LinearMap

_KILLED = 1e-13  # of |K|^2: what P leaves of an invariant is rounding


@dataclass(frozen=True, eq=False)
class Move:
    """Rows c on their way to rows a: S_at - S_tt = up @ rows, S_tt = rows^T rows / n.

    Attributes:
        up: (d, m) float64.
        rows: (m, d) float64, m at most d.
        n: how many rows c there are.
    """

    up: Tensor
    rows: Tensor
    n: int

    @classmethod
    def of(cls, c: Tensor, a: Tensor) -> Move:
        """From rows c and a, (n, d) each."""
        n, up = len(c), (a - c).T / len(c)
        if n <= c.shape[1]:
            return cls(up, c, n)
        q, r = torch.linalg.qr(c)
        return cls(up @ q, r, n)

    @cached_property
    def free(self) -> Tensor:
        """rows (I + S_tt)^-1, (m, d): with `up` before it the edit that nothing constrains, alpha = 1."""
        return torch.cholesky_solve(self.rows, self._factor(self.rows, 1.0))

    def inside(self, basis: Tensor, invariants: Tensor, *, retain_scale: float, lamb2: float) -> LinearMap:
        """I + X for an orthonormal basis (d, k) and rows of invariants (i, d).

        Invariants that are outside the space already, or that others imply, constrain nothing: the inverse of
        K^T P M0 K is a pseudo-inverse.
        """
        rows, k = self.rows @ basis, invariants @ basis
        down = torch.cholesky_solve(rows, self._factor(rows, retain_scale))
        left = (k - k @ rows.T / self.n @ down) / retain_scale  # K^T P M0
        inner = left @ k.T + lamb2 * torch.eye(len(k), dtype=k.dtype, device=k.device)
        rounding = _KILLED * float(invariants.square().sum()) / retain_scale
        inverse = torch.linalg.pinv((inner + inner.T) / 2, atol=rounding, rtol=0.0, hermitian=True)
        down = (down - down @ k.T @ inverse @ left) @ basis.T
        # of the matrix that was solved with, from above
        condition = 1 + float(rows.square().sum()) / (self.n * retain_scale)
        return LinearMap(self.up, down, condition)

    def _factor(self, rows: Tensor, ridge: float) -> Tensor:
        inner = rows @ rows.T / self.n
        inner.diagonal().add_(ridge)
        return torch.linalg.cholesky(inner)


def null_space(gram: Tensor, threshold: float) -> Tensor:
    """Orthonormal basis (d, k) of the eigenvectors of a Gram matrix with eigenvalues below the threshold.

    Raises:
        ValueError: if there is none.
    """
    values, vectors = torch.linalg.eigh(gram)
    basis = vectors[:, values < threshold]
    if not basis.shape[1]:
        raise ValueError(
            f"threshold: got {threshold}, expected more than {float(values[0]):.3g}, the least eigenvalue of "
            "the retained tokens' mean Gram matrix, or fewer texts to retain"
        )
    return basis


def retained_gram(
    rows: Tensor, weight: Tensor, move: Move, noise: Tensor, *, influence_filter: bool
) -> Tensor:
    """Mean outer product of what one layer has to retain: rows r that the edit hits, and copies of them.

    ::

        E = W (S_at - S_tt) (I + S_tt)^-1        keep r with |E r| > mean_r |E r|
        r' = r + z v,  z ~ N(0, 1)               keep r' with |E r'| > mean_r' |E r'|

    v is the direction that the layer sees least, so that copies look like r to it. Where all are hit alike,
    all are kept.

    Args:
        rows: (r, d).
        weight: of the layer, (o, d) float64.
        move: what shall be erased.
        noise: z, (r, copies).
        influence_filter: False keeps everything.

    Returns:
        (d, d) float64.
    """
    free, v = move.free, least_seen(weight)
    out = weight @ move.up
    metric = out.T @ out
    seen, along = rows @ free.T, free @ v
    # |E r'|^2 = |E r|^2 + 2 z <E r, E v> + z^2 |E v|^2
    pulled = seen @ metric
    own, cross, alone = (pulled * seen).sum(1), pulled @ along, along @ metric @ along
    kept = _above_mean(own) if influence_filter else torch.ones_like(own, dtype=torch.bool)
    rows, own, cross, noise = rows[kept], own[kept, None], cross[kept, None], noise[kept]
    if influence_filter:
        copied = _above_mean(own + 2 * noise * cross + noise.square() * alone)
    else:
        copied = torch.ones_like(noise, dtype=torch.bool)
    noise = noise * copied
    times = 1 + copied.sum(1)
    mixed = torch.outer(noise.sum(1) @ rows, v)
    gram = rows.T @ (times[:, None] * rows) + mixed + mixed.T + noise.square().sum() * torch.outer(v, v)
    return gram / times.sum()


def least_seen(weight: Tensor) -> Tensor:
    """The right singular vector of the smallest of min(o, d) singular values of (o, d), up to its sign."""
    if len(weight) >= weight.shape[1]:
        return torch.linalg.eigh(weight.T @ weight).eigenvectors[:, 0]
    right = weight.T @ torch.linalg.eigh(weight @ weight.T).eigenvectors[:, 0]
    return right / right.norm().clamp(min=torch.finfo(right.dtype).tiny)


def _above_mean(squares: Tensor) -> Tensor:
    lengths = squares.clamp(min=0).sqrt()
    above = lengths > lengths.mean()
    return above if bool(above.any()) else torch.ones_like(above)
