"""The engine that detectors share: prompts x seeds in full batches, and nothing computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pumice import ops
from pumice.models import DiffusionModel, PromptEmbeds


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """x_T of every seed, (S, C, h, w) float32 on the CPU, whatever the model's device.

    It is what a diffusers pipeline starts from with `generator=torch.Generator().manual_seed(seed)`.
    """
    return torch.cat(
        [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


class ConditionalMagnitude:
    """|epsilon_cond - epsilon_uncond| of prompts and seeds at the first steps of a guided DDIM sampler.

    The unconditional prediction at the first step, where no prompt has moved the latents yet, is computed
    once, here. Calls of the denoiser have `batch_size` rows, the last one filled up, so that a row's rounding
    does not depend on how many others there are; only a job of less than one call runs at its own size. On
    out-of-memory the size is halved, and stays so.

    Attributes:
        timesteps: those that are scored.
    """

    def __init__(
        self,
        model: DiffusionModel,
        noise: Tensor,
        *,
        steps: int,
        num_inference_steps: int,
        guidance_scale: float,
        batch_size: int,
    ) -> None:
        self.timesteps = model.schedule.timesteps(num_inference_steps)[:steps]
        self._model, self._guidance_scale, self._batch_size = model, guidance_scale, batch_size
        self._noise = noise.to(model.device)
        self._uncond = model.unconditional()
        self._t = self.timesteps.to(model.device)
        self._scale = model.schedule.epsilon_scale(self.timesteps).float()
        # deterministic DDIM in the columns of `ops.guidance_step`
        ddim = model.schedule.ddim_coefficients(num_inference_steps)[:steps]
        self._coefficients = torch.nn.functional.pad(ddim, (0, 2)).float().to(model.device)
        self._first = self._halving(self._first_unconditional)

    def __call__(self, prompts: PromptEmbeds, advance: Callable[[int], object]) -> Tensor:
        """Magnitudes of P prompts, (P, S, steps) float32 on the CPU; nothing is read from the device before.

        `advance` is told after every call of the denoiser how many rows of it were new.
        """
        magnitudes = self._halving(lambda rows: self._run(prompts, rows, advance))
        return magnitudes.cpu().reshape(len(prompts), len(self._noise), -1) * self._scale

    def _run(self, prompts: PromptEmbeds, rows: int, advance: Callable[[int], object]) -> Tensor:
        seeds = len(self._noise)
        total = len(prompts) * seeds
        rows = min(rows, total)
        found = []
        for start in range(0, total, rows):
            row = torch.arange(start, start + rows)
            row = torch.where(row < total, row, 0)  # past the end, the first row again
            found.append(self._trajectory(prompts[(row // seeds).tolist()], row % seeds))
            advance(min(rows, total - start))
        return torch.cat(found)[:total]

    def _trajectory(self, prompts: PromptEmbeds, seed: Tensor) -> Tensor:
        """Of one call's rows, (rows, steps)."""
        x, uncond = self._noise[seed], self._first[seed]
        found = []
        for step, t in enumerate(self._t):
            if step > 0:
                uncond = self._model.predict(x, t, self._uncond).float()
            cond = self._model.predict(x, t, prompts).float()
            if step + 1 == len(self._t):
                magnitude = ops.guidance_magnitude(cond, uncond)
            else:
                x, magnitude = ops.guidance_step(  # type: ignore[assignment]
                    x,
                    cond,
                    uncond,
                    self._guidance_scale,
                    self._coefficients[step],
                    prediction_type=self._model.prediction_type,
                    magnitude=True,
                )
            found.append(magnitude.difference)
        return torch.stack(found, dim=1)

    def _first_unconditional(self, rows: int) -> Tensor:
        parts = self._noise.split(rows)
        return torch.cat([self._model.predict(part, self._t[0], self._uncond).float() for part in parts])

    def _halving(self, work: Callable[[int], Tensor]) -> Tensor:
        while True:
            try:
                return work(self._batch_size)
            except torch.OutOfMemoryError:
                if self._batch_size == 1:
                    raise
                self._batch_size = (self._batch_size + 1) // 2
