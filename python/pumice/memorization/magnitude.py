"""The text-conditional magnitude (Wen et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .arguments import check_first_step, checked_steps
from .engine import Rows, Screen
from .metric import Metric


@dataclass(frozen=True)
class Magnitude(Metric):
    """How strongly a prompt pulls the prediction, |epsilon_cond - epsilon_uncond| (arXiv:2407.21720).

    ::

        m_t = |epsilon(x_t, t, prompt) - epsilon(x_t, t, "")|_2    over (C, h, w);  score = mean over t

    Attributes:
        steps: how many of the sampler's first steps; None for all. Default 1, the paper's fastest setting;
            its best takes all. The first step costs one row of the denoiser for a prompt and seed, later
            ones two.

    Differences from the released code: the noise depends on the seed alone, not on the prompt's place in the
    list; norms are in float32, not in the model's dtype; v-predictions are converted to epsilon.
    """

    name: ClassVar[str] = "magnitude"
    steps: int | None = 1

    def columns(self, screen: Screen) -> tuple[str, ...]:
        steps = checked_steps(self.steps, len(screen.sampler.timesteps))
        check_first_step(screen.model, int(screen.sampler.timesteps[0]))
        return tuple(f"magnitude at t={t}" for t in screen.sampler.timesteps[:steps].tolist())

    def measure(self, screen: Screen, rows: Rows) -> Tensor:
        steps = checked_steps(self.steps, len(screen.sampler.timesteps))
        return torch.stack([step.magnitude for step in screen.trajectory(rows, steps)], dim=1)
