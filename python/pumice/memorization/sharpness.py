"""Sharpness: how fast the text-conditional score turns along itself (Jeon, Kim and No, ICML 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .arguments import check_first_step, checked_steps
from .engine import Rows, Screen, Step
from .metric import Metric


@dataclass(frozen=True)
class Sharpness(Metric):
    """The Hessian of the log-likelihood ratio, applied to its own gradient (arXiv:2412.04140).

    ::

        s(x) = -(epsilon_cond - epsilon_uncond) / sigma_t      the difference of the two scores
        |H s|  with  H = grad s   ~   |s(x + h u) - s(x)| / h  |s(x)|,      u = s / |s|

    with h = displacement sqrt(D), by a finite difference.

    Attributes:
        steps: how many of the sampler's first steps, averaged; None for all. Default 1, the paper's.
        displacement: h in units of the noise's norm sqrt(D). Default 1/128: h = 1 for 512 x 512 pictures of
            Stable Diffusion 1, the length of the paper's own displacement in its mitigation (SAIL).

    Three rows of the denoiser for a prompt, seed and step (four after the first). Differences from the
    released code: a finite difference in place of a forward-mode derivative, which needs no float32 and no
    slow attention; it is exact where s is linear, as it is for Gaussians. v-predictions are converted.
    """

    name: ClassVar[str] = "sharpness"
    steps: int | None = 1
    displacement: float = 1 / 128

    def columns(self, screen: Screen) -> tuple[str, ...]:
        steps = checked_steps(self.steps, len(screen.sampler.timesteps))
        check_first_step(screen.model, int(screen.sampler.timesteps[0]))
        if not self.displacement > 0:
            raise ValueError(f"displacement: got {self.displacement}, expected a positive number")
        return tuple(f"sharpness at t={t}" for t in screen.sampler.timesteps[:steps].tolist())

    def measure(self, screen: Screen, rows: Rows) -> Tensor:
        steps = checked_steps(self.steps, len(screen.sampler.timesteps))
        return torch.stack([self._at(screen, rows, step) for step in screen.trajectory(rows, steps)], dim=1)

    def _at(self, screen: Screen, rows: Rows, step: Step) -> Tensor:
        _, sigma = screen.model.schedule.alpha_sigma(screen.sampler.timesteps[step.index])
        h = self.displacement * math.sqrt(step.x[0].numel())
        base = screen.difference(step.cond, step.uncond, step.index) / -sigma.item()
        norm = base.flatten(1).norm(dim=1)
        direction = base / norm.clamp(min=1e-12)[:, None, None, None]
        x = step.x + h * direction
        cond, uncond = (screen.predict(x, step.index, prompts) for prompts in (rows.prompts, None))
        displaced = screen.difference(cond, uncond, step.index) / -sigma.item()
        return (displaced - base).flatten(1).norm(dim=1) / h * norm
