"""The sampler that methods walk along: deterministic DDIM with guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from pumice import ops
from pumice.ops.guidance_step import GuidanceStep

from .model import DiffusionModel


class GuidedSampler:
    """DDIM (arXiv:2010.02502) without noise, classifier-free guidance, and no host read in its loop.

    As diffusers' `DDIMScheduler` with eta = 0 steps from the model's own schedule.

    Attributes:
        timesteps: descending, (steps,) int64 on the CPU.
        t: the same on the model's device.
    """

    def __init__(self, model: DiffusionModel, num_inference_steps: int, guidance_scale: float) -> None:
        self.timesteps = model.schedule.timesteps(num_inference_steps)
        self.t = self.timesteps.to(model.device)
        self._prediction_type, self._guidance_scale = model.prediction_type, guidance_scale
        # the columns of `ops.guidance_step`: no clipped x0, no noise
        coefficients = model.schedule.ddim_coefficients(num_inference_steps)
        self._coefficients = torch.nn.functional.pad(coefficients, (0, 2)).float().to(model.device)

    def step(self, index: int, x: Tensor, cond: Tensor, uncond: Tensor) -> GuidanceStep:
        """From x at `timesteps[index]` to the next, with the norms of the guidance direction.

        Args:
            index: of the step.
            x: (B, C, h, w) float32.
            cond, uncond: the model's raw outputs, float32; `uncond` may be a batch of 1.
        """
        return ops.guidance_step(
            x,
            cond,
            uncond,
            self._guidance_scale,
            self._coefficients[index],
            prediction_type=self._prediction_type,
            magnitude=True,
        )
