"""Anisotropy: a norm at high noise and an alignment at low noise (Asthana and Belagiannis, ICLR 2026)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pumice import ops

from .arguments import check_finite, check_first_step
from .engine import Rows, Screen
from .metric import Metric

_LOW = -3  # the third step from the end: t = 41 of 50 steps


@dataclass(frozen=True)
class Anisotropy(Metric):
    """Two looks at pure noise, without any denoising (arXiv:2601.20642).

    ::

        d = epsilon_cond - epsilon_uncond
        score = norm_weight |d| at the first timestep
              + cosine_weight mean over positions of cos(d, epsilon_uncond) at the third timestep from the end

    both at x_T, the cosine over the channels of a position. At low noise the distribution around a memorized
    picture is narrow, and d points along the unconditional score.

    Attributes:
        norm_weight, cosine_weight: default 1 and 2, the released code's for Stable Diffusion 1.4; it has
            1 and 0.1 for 2.0, 2 and 1 for Realistic Vision 5.1.

    Two rows of the denoiser for a prompt and seed. Differences from the released code: predictions are
    converted from v to epsilon before the cosine; the norm is float32.
    """

    name: ClassVar[str] = "anisotropy"
    norm_weight: float = 1.0
    cosine_weight: float = 2.0

    def columns(self, screen: Screen) -> tuple[str, ...]:
        check_finite("norm_weight", self.norm_weight)
        check_finite("cosine_weight", self.cosine_weight)
        timesteps = screen.sampler.timesteps.tolist()
        if len(timesteps) < 4:
            raise ValueError(f"num_inference_steps: got {len(timesteps)}, expected at least 4 for anisotropy")
        check_first_step(screen.model, timesteps[0])
        return (f"magnitude at t={timesteps[0]}", f"cosine at t={timesteps[_LOW]}")

    def measure(self, screen: Screen, rows: Rows) -> Tensor:
        x, low = screen.noise[rows.seed], len(screen.sampler.timesteps) + _LOW
        high = screen.difference(screen.predict(x, 0, rows.prompts), screen.unconditional(0)[rows.seed], 0)
        cond, uncond = (
            screen.epsilon(output, x, low)
            for output in (screen.predict(x, low, rows.prompts), screen.unconditional(low)[rows.seed])
        )
        cosine = ops.guidance_magnitude(cond, uncond).cosine / math.prod(x.shape[2:])
        return torch.stack([high.flatten(1).norm(dim=1), cosine], dim=1)

    def score(self, values: Tensor) -> Tensor:
        return self.norm_weight * values[..., 0] + self.cosine_weight * values[..., 1]
