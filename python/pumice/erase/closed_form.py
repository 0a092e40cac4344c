"""The one equation behind every closed-form edit: rows of tokens, what they shall become, what shall stay.

::

    min_M  eta sum_i |W M c_i - W g_i|^2  +  gamma sum_j |W M p_j - W p_j|^2  +  lambda |W M - W|^2

    M = I + eta (G - C)^T C A^-1,      A = lambda I + eta C^T C + gamma P^T P

The solution does not know W: one d x d map M serves every key and value projection of a model, W <- W M. It
is kept as two factors, M = I + up @ down, so that no edit is exactly no change, and all in float64, as A is
badly conditioned. Rows of C and G are tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from torch import Tensor


class SingularError(ValueError):
    """Without a ridge, and with too few rows to preserve, the equation has no single solution."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """M = I + up @ down.

    Attributes:
        up: (d, r) float64.
        down: (r, d) float64.
        condition: number of the matrix A that was solved with, an estimate from below; 1 for no edit.
    """

    up: Tensor
    down: Tensor
    condition: float = 1.0

    def __call__(self, rows: Tensor) -> Tensor:
        """M e for each row e of (n, d)."""
        return rows + self.step(rows)

    def step(self, rows: Tensor) -> Tensor:
        """(M - I) e for each row e of (n, d)."""
        return (rows if self._full else rows @ self.down.T) @ self.up.T

    def delta(self) -> Tensor:
        """M - I, (d, d)."""
        return self.up if self._full else self.up @ self.down

    def dense(self) -> Tensor:
        """M itself, (d, d)."""
        return _eye(self.up) + self.delta()

    def then(self, other: LinearMap) -> LinearMap:
        """M_self M_other: the edit of a model that self has edited already."""
        condition = max(self.condition, other.condition)
        if not len(self.down):
            return LinearMap(other.up, other.down, condition)
        if self._full and other._full:
            return LinearMap(self.up + other.up + self.up @ other.up, self.down, condition)
        up = torch.cat([self.up, other.up], dim=1)
        down = torch.cat([self.down + (self.down @ other.up) @ other.down, other.down])
        return LinearMap(up, down, condition).compact()

    def compact(self) -> LinearMap:
        """The same map with at most d factors."""
        if len(self.down) <= self.down.shape[1]:
            return self
        return LinearMap(self.delta(), _eye(self.up), self.condition)

    @property
    def _full(self) -> bool:
        """Whether up is M - I itself."""
        return self.down is _eye(self.up)


@dataclass(eq=False)
class Preserved:
    """What shall stay, as the Gram matrix of its rows; its factorisations are kept for the next edit.

    Attributes:
        gram: gamma P^T P, (d, d) float64.
        rows: how many rows it is of.
    """

    gram: Tensor
    rows: int
    _factors: dict[float, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, rows: Tensor, scale: float = 1.0) -> Preserved:
        """From rows (p, d) and their weight gamma."""
        rows = rows.double()
        return cls(scale * rows.T @ rows, len(rows))

    def factor(self, lamb: float) -> Tensor:
        """Cholesky factor of lambda I + gamma P^T P.

        Raises:
            SingularError: if that is not positive definite.
        """
        if lamb not in self._factors:
            self._factors[lamb] = cholesky(_ridged(self.gram, lamb))
        return self._factors[lamb]


def solve(
    c: Tensor, g: Tensor, *, erase_scale: float = 1.0, lamb: float, preserved: Preserved | None = None
) -> LinearMap:
    """The map that takes rows c (m, d) to rows g, by the primal or dual form, whichever is less work.

    Raises:
        SingularError: for lambda = 0 without d independent rows.
    """
    rows, assemble = _split(c, g)
    solved, condition = down_factor(c, rows=rows, erase_scale=erase_scale, lamb=lamb, preserved=preserved)
    return assemble(erase_scale, solved, condition)


def down_factor(
    c: Tensor,
    *,
    rows: Tensor | None = None,
    erase_scale: float = 1.0,
    lamb: float,
    preserved: Preserved | None = None,
) -> tuple[Tensor, float]:
    """C A^-1, or rows A^-1 of other rows (n, d), and the condition number of A."""
    rows = c if rows is None else rows
    few = rows is c and len(c) < c.shape[1] / 2
    if few and preserved is None and lamb > 0:
        # C A^-1 = (lambda I + eta C C^T)^-1 C: nothing of size d x d
        inner = _ridged(erase_scale * c @ c.T, lamb)
        return torch.cholesky_solve(c, cholesky(inner)), _largest(inner.matmul, inner) / lamb
    if few and preserved is not None:
        try:
            return _woodbury(c, erase_scale, lamb, preserved)
        except SingularError:
            if lamb > 0:
                raise  # else what is preserved does not fill the space alone, but may do so with c
    a = _ridged(_gram(c, erase_scale, preserved), lamb)
    factor = cholesky(a)
    condition = _largest(a.matmul, a) * _largest(lambda x: torch.cholesky_solve(x, factor), a)
    return torch.cholesky_solve(rows.T, factor).T, condition


def _woodbury(c: Tensor, erase_scale: float, lamb: float, preserved: Preserved) -> tuple[Tensor, float]:
    """With Y = C (lambda I + gamma P^T P)^-1, whose factor the next edit finds again,
    C A^-1 = (I + eta Y C^T)^-1 Y."""
    factor = preserved.factor(lamb)
    y = torch.cholesky_solve(c.T, factor).T
    inner = _ridged(erase_scale * y @ c.T, 1.0)

    def forward(x: Tensor) -> Tensor:
        return lamb * x + preserved.gram @ x + erase_scale * c.T @ (c @ x)

    def inverse(x: Tensor) -> Tensor:
        z = torch.cholesky_solve(x, factor)
        return z - erase_scale * y.T @ torch.linalg.solve(inner, c @ z)

    condition = _largest(forward, preserved.gram) * _largest(inverse, preserved.gram)
    return torch.linalg.solve(inner, y), condition


def sweep_erase_scale(
    c: Tensor, g: Tensor, erase_scales: Iterable[float], *, lamb: float, preserved: Preserved | None = None
) -> Iterator[LinearMap]:
    """`solve` for every erase scale, by one eigendecomposition.

    ::

        L L^T = lambda I + gamma P^T P,   L^-1 C^T C L^-T = Q Lambda Q^T
        A^-1 = L^-T Q (I + eta Lambda)^-1 (L^-T Q)^T
    """
    rows, assemble = _split(c, g)
    kept = _ridged(_gram(c, 0.0, preserved), lamb)
    factor, gram = cholesky(kept), c.T @ c
    half = torch.linalg.solve_triangular(factor, c.T, upper=False)
    values, vectors = torch.linalg.eigh(half @ half.T)
    values = values.clamp(min=0)
    basis = torch.linalg.solve_triangular(factor.T, vectors, upper=True)
    left = rows @ basis
    for eta in erase_scales:
        shrink = 1 + eta * values
        condition = _largest((kept + eta * gram).matmul, kept)
        condition *= _largest(partial(_between, basis / shrink, basis.T), kept)
        yield assemble(eta, left / shrink @ basis.T, condition)


def sweep_lamb(
    c: Tensor, g: Tensor, lambs: Iterable[float], *, erase_scale: float, preserved: Preserved | None = None
) -> Iterator[LinearMap]:
    """`solve` for every lambda > 0, by one eigendecomposition of eta C^T C + gamma P^T P."""
    rows, assemble = _split(c, g)
    values, vectors = torch.linalg.eigh(_gram(c, erase_scale, preserved))
    values, left = values.clamp(min=0), rows @ vectors
    for lamb in lambs:
        condition = float((values[-1] + lamb) / (values[0] + lamb))
        yield assemble(erase_scale, left / (values + lamb) @ vectors.T, condition)


def _split(c: Tensor, g: Tensor) -> tuple[Tensor, Callable[[float, Tensor, float], LinearMap]]:
    """Rows to multiply by A^-1, and how the map is made of the products: never more than d of them."""
    if len(c) <= c.shape[1]:
        return c, lambda eta, solved, condition: LinearMap(eta * (g - c).T, solved, condition)
    return (g - c).T @ c, lambda eta, solved, condition: LinearMap(eta * solved, _eye(solved), condition)


def _between(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return a @ (b @ x)


def _gram(c: Tensor, erase_scale: float, preserved: Preserved | None) -> Tensor:
    gram = erase_scale * c.T @ c
    return gram if preserved is None else gram + preserved.gram


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    return matrix + ridge * _eye(matrix)


def _eye(like: Tensor) -> Tensor:
    return _identity(len(like), like.dtype, like.device)


@lru_cache(maxsize=4)
def _identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One for all maps, so that an edit has it once. Nobody writes to it."""
    return torch.eye(size, dtype=dtype, device=device)


def cholesky(matrix: Tensor) -> Tensor:
    """The lower factor.

    Raises:
        SingularError: for a matrix that is not positive definite, or by a hair.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if bool(failed) or not bool(pivots.min() > 1e-14 * pivots.max()):
        raise SingularError(f"the {len(matrix)} x {len(matrix)} matrix of the rows is singular")
    return factor


def _largest(times: Callable[[Tensor], Tensor], like: Tensor, rounds: int = 24) -> float:
    """The largest eigenvalue of a symmetric positive matrix, by power iteration: a little too small."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(like), 4, generator=generator, dtype=torch.float64).to(like.device)
    value = 0.0
    for _ in range(rounds):
        y = times(x)
        before, value = value, float(torch.linalg.eigvalsh(x.T @ y)[-1])
        if abs(value - before) <= 1e-3 * value:
            break
        x = torch.linalg.qr(y).Q
    return value
