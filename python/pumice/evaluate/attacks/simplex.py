"""The nearest distribution to any vector."""

from __future__ import annotations

from torch import Tensor


def project(x: Tensor) -> Tensor:
    """The point of the simplex that is nearest to each row: exact, no row or step of it waits for the host.

    ::

        max(x - theta, 0)        theta such that it sums to 1

    by sorting (Held, Wolfe and Crowder, 1974).

    Args:
        x: (..., n) floating.

    Returns:
        (..., n), not negative, each row of sum 1.
    """
    x = x - x.amax(-1, keepdim=True)  # moves theta alone, and keeps sums small
    high = x.double().sort(-1, descending=True).values
    excess = high.cumsum(-1) - 1
    size = high.new_ones(high.shape[-1]).cumsum(0)
    count = (high * size > excess).sum(-1, keepdim=True)
    theta = excess.gather(-1, count - 1) / count
    return (x - theta).clamp(min=0).to(x.dtype)
