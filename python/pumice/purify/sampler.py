"""The batched sampler of all diffusion purifiers: rows are noised, and walk back together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from pumice.models import Denoised, RowBudget
from pumice.models.arguments import checked_count, checked_seeds
from pumice.models.draws import Draws
from pumice.models.graph import Graphed

from .batches import in_batches
from .walk import Walk

Denoise = Callable[[Tensor, Tensor], Denoised]
"""From x_t (n, C, h, w) and the timestep, a tensor (), to what is made of it."""

ROWS = 16  # of a pass: running out of a CPU's memory cannot be caught


class Options(TypedDict, total=False):
    """What every diffusion purifier takes beside its own arguments.

    seed: of picture 0, one more for each further picture; or a list with one for each. Default 0.
    batch_size: rows of a pass of the network, pictures or parts of them; halved on out-of-memory. Default
        None, 16.
    progress: show a bar. Default False.
    """

    seed: int | Sequence[int]
    batch_size: int | None
    progress: bool


class Sampler:
    """Rows, each with random numbers of its own, on their way through a denoiser.

    Args:
        denoise: the network.
        parts: of how many rows each picture is made.
        device: of the network.
        seed, batch_size: `Options`.

    Attributes:
        draws: the rows' random numbers.
        budget: of a pass.
    """

    def __init__(
        self,
        denoise: Denoise,
        parts: Sequence[int],
        device: torch.device,
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
    ) -> None:
        seeds = checked_seeds(seed, len(parts))
        names = [f"{seeds[of]}/{part}" for of, count in enumerate(parts) for part in range(count)]
        self.draws, self._device = Draws(names, device), device
        most = ROWS if batch_size is None else checked_count("batch_size", batch_size)
        self.budget = RowBudget(min(most, len(names)))
        self._work = Graphed(lambda *args: _step(denoise, *args))

    @torch.no_grad()
    def __call__(
        self, rows: Sequence[Tensor], walk: Walk, *, round: int = 0, tick: Callable[[int], Any] | None = None
    ) -> list[Tensor]:
        """Noise rows and walk back.

        Args:
            rows: (C, h, w) float32 each, in the range of the network, one for each row of the sampler.
            walk: that they take.
            round: which of several walks this is; each has random numbers of its own.
            tick: called with the number of rows after each pass of the network.

        Returns:
            The rows (C, h, w) where the walk ends.
        """
        return in_batches(rows, self.budget, lambda numbers, x: self._walked(numbers, x, walk, round), tick)

    def _walked(self, numbers: Sequence[int], x: Tensor, walk: Walk, round: int) -> Tensor:
        x, shape = x.to(self._device), x.shape[1:]
        x = walk.alpha * x + walk.sigma * self.draws.normal(numbers, "start", round, shape)
        timesteps = walk.timesteps.to(self._device)
        coefficients = walk.coefficients.float().to(self._device)
        last, quiet = torch.zeros_like(x), torch.zeros_like(x)
        for step, noisy in enumerate(walk.noisy):
            noise = self.draws.normal(numbers, f"step {step}", round, shape) if noisy else quiet
            x, last = self._work(x, last, noise, timesteps[step], coefficients[step])
        return x


def _step(
    denoise: Denoise, x: Tensor, last: Tensor, noise: Tensor, timestep: Tensor, coefficients: Tensor
) -> Tensor:
    """(2, n, C, h, w): the next x, and x0."""
    x0, share = denoise(x, timestep)
    of_x, of_x0, of_last, small, large = coefficients
    spread = small if share is None else share * large + (1 - share) * small
    after = of_x * x + of_x0 * x0 + of_last * last + (spread / 2).exp() * noise
    return torch.stack((after, x0))
