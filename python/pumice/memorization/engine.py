"""The engine that detectors share: prompts x seeds through the denoiser in full batches, nothing computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor

from pumice import ops
from pumice.models import DiffusionModel, PromptEmbeds


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """x_T of every seed, (S, C, h, w) float32 on the CPU: the noise that a diffusers pipeline starts from when
    its call gets `generator=torch.Generator().manual_seed(seed)`, whatever the device and the batch."""
    return torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def conditional_magnitudes(
    model: DiffusionModel,
    prompt_embeds: PromptEmbeds,
    uncond: PromptEmbeds,
    noise: Tensor,
    *,
    steps: int,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    advance: Callable[[int], object] = lambda calls: None,
) -> Tensor:
    """|epsilon_cond - epsilon_uncond| of every prompt and seed at the first `steps` steps of a DDIM sampler.

    The unconditional prediction at the first step is computed once a seed. Calls have `batch_size` rows, the
    last one filled up, so that a row's rounding does not depend on how many others there are; only a job of
    less than one call runs at its own size. On out-of-memory all starts again at half the size.

    Args:
        prompt_embeds: P prompts.
        uncond: the one that guidance leads away from.
        noise: (S, C, h, w), x_T of each seed.
        advance: told after every call how many rows of it were new.

    Returns:
        (P, S, steps), float32, on the CPU. Nothing before that is read back from the device.
    """
    prompts, seeds = len(prompt_embeds), len(noise)
    noise = noise.to(model.device)
    timesteps = model.schedule.timesteps(num_inference_steps)[:steps].to(model.device)
    coefficients = _step_coefficients(model, num_inference_steps, steps)
    to_epsilon = model.schedule.epsilon_scale(model.schedule.timesteps(num_inference_steps)[:steps])

    @find_executable_batch_size(starting_batch_size=min(batch_size, prompts * seeds))  # type: ignore[untyped-decorator]
    def run(rows: int) -> Tensor:
        first = torch.cat(
            [model.predict(noise[_rows(i, rows, seeds)], timesteps[0], uncond) for i in range(0, seeds, rows)]
        )[:seeds].float()
        found = []
        for start in range(0, prompts * seeds, rows):
            row = _rows(start, rows, prompts * seeds)
            prompt, seed = row // seeds, row % seeds
            embeds, x, without = prompt_embeds[prompt.tolist()], noise[seed], first[seed]
            columns = []
            for step in range(steps):
                if step > 0:
                    without = model.predict(x, timesteps[step], uncond).float()
                cond = model.predict(x, timesteps[step], embeds).float()
                if step + 1 == steps:
                    columns.append(ops.guidance_magnitude(cond, without).difference)
                    break
                x, magnitude = ops.guidance_step(
                    x, cond, without, guidance_scale, coefficients[step],
                    prediction_type=model.prediction_type, magnitude=True,
                )  # fmt: skip
                assert magnitude is not None
                columns.append(magnitude.difference)
            found.append(torch.stack(columns, dim=1))
            advance(min(rows, prompts * seeds - start))
        return torch.cat(found)[: prompts * seeds]

    magnitudes: Tensor = run()
    return magnitudes.float().cpu().reshape(prompts, seeds, steps) * to_epsilon.float()


def _rows(start: int, count: int, total: int) -> Tensor:
    """Row numbers `start` ... `start + count - 1`; those past the end are the first row again."""
    rows = torch.arange(start, start + count)
    return torch.where(rows < total, rows, 0)


def _step_coefficients(model: DiffusionModel, num_inference_steps: int, steps: int) -> Tensor:
    """Deterministic DDIM as columns of `ops.guidance_step`, (steps, 6) float32 on the model's device."""
    table = model.schedule.ddim_coefficients(num_inference_steps)[:steps]
    return torch.cat([table, torch.zeros(len(table), 2, dtype=table.dtype)], dim=1).float().to(model.device)
