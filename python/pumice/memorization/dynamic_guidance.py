"""Guidance withheld until the picture has left the attraction basin of a replay (Jain et al., CVPR 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LATEST_TIMESTEP = 500
"""Below it guidance begins in any case: the lowest of the static transition points that the paper tries."""


class Transition:
    """Which samples have passed the first local minimum of their text-conditional magnitude.

    One call a step; the state lives on the magnitudes' device and nothing is read from it.
    """

    def __init__(self) -> None:
        self._before: Tensor | None = None
        self._previous: Tensor | None = None
        self._passed: Tensor | None = None

    def update(self, magnitude: Tensor, *, due: Tensor | bool = False) -> Tensor:
        """The samples (N,) bool whose transition is at this step or behind it.

        Args:
            magnitude: (N,), |d| of this step.
            due: that it is the latest step at which guidance may begin: it does, minimum or not.
        """
        if self._before is None or self._previous is None or self._passed is None:
            # nothing compares with NaN: the earliest declaration is at the third step
            self._before = self._previous = torch.full_like(magnitude, torch.nan)
            self._passed = torch.zeros_like(magnitude, dtype=torch.bool)
        rising = (magnitude > self._previous) & (self._before > self._previous)
        self._passed = self._passed | rising | due
        self._before, self._previous = self._previous, magnitude
        return self._passed


def transition_step(trace: Tensor | Sequence[float], latest: int | None = None) -> int | None:
    """The step of a recorded trace at which dynamic guidance begins.

    ::

        transition = min { i >= 2 : |d|_i > |d|_(i-1)  and  |d|_(i-2) > |d|_(i-1) }

    the step after the first local minimum of the magnitude, which is where it is known to be one (Jain et
    al., arXiv:2411.16738). Both comparisons are strict: a trace with a flat bottom, or with no minimum
    inside, has no transition.

    Args:
        trace: (steps,), |d| of one sample.
        latest: the step at which guidance begins if there was no minimum before. Default None: it then never
            does, as in the released code.

    Returns:
        The index of the first step with guidance, or None.

    Raises:
        ValueError: if the trace is not one-dimensional.
    """
    trace = torch.as_tensor(trace).double()
    if trace.ndim != 1:
        raise ValueError(f"trace: got shape {tuple(trace.shape)}, expected (steps,)")
    transition = Transition()
    for step, magnitude in enumerate(trace):
        if transition.update(magnitude, due=step == latest):
            return step
    return None


def with_guidance_scale(
    cond: Tensor, uncond: Tensor, rows: Tensor, guidance_scale: float, wanted: float
) -> Tensor:
    """Conditional predictions that a sampler which guides by one scale turns into another scale's.

    ::

        cond' = uncond + (g' / g) (cond - uncond)
        uncond + g (cond' - uncond) = uncond + g' (cond - uncond)

    Args:
        cond, uncond: (N, ...), the two predictions.
        rows: (N,) bool, the samples that are to have it; the others keep their bits.
        guidance_scale: g, the sampler's.
        wanted: g'; 1 is the conditional prediction alone, 0 the unconditional one, below is opposite
            guidance.
    """
    other = torch.lerp(uncond, cond, wanted / guidance_scale)
    return torch.where(rows.reshape(-1, *[1] * (cond.ndim - 1)), other, cond)
