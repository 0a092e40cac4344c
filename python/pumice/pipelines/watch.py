"""A running call of a pipeline, watched and influenced through its denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pumice import ops
from pumice.models import NoiseSchedule, PromptTokens, UnsupportedModelError
from pumice.pipelines.guard import Guard
from pumice.pipelines.responses import RESPONSES, Conditional, Flagged
from pumice.pipelines.step import Step


class Watch:
    """The magnitudes of one call's steps, and the guard's response to the first.

    A guard decides inside the first call of the denoiser, before the sampler has moved. A response that wants
    other latents or embeddings repeats that call, and the sampler goes on from what came out: no generator is
    read twice, no callback sees a step twice, and nothing has to be undone.

    Attributes:
        flagged: (N,) bool on the CPU, None without guard.
    """

    def __init__(
        self, pipe: Any, guard: Guard | None, track_noise_norm: bool, prompts: tuple[PromptTokens, ...]
    ) -> None:
        self.flagged: Tensor | None = None
        self._pipe, self._guard, self._track, self._prompts = pipe, guard, track_noise_norm, prompts
        self._schedule = NoiseSchedule.from_config(pipe.scheduler.config)
        self._latents: Tensor
        self._norms: list[Tensor] = []
        self._conditional: Conditional | None = None
        self._hooks = ExitStack()
        self._responding = False

    def start(self, latents: Tensor) -> None:
        """The sampler is ready, and starts from `latents`."""
        schedule = self._schedule
        pure_noise = schedule.zero_terminal_snr and (
            schedule.alphas_cumprod[int(self._pipe.scheduler.timesteps[0])] == 0
        )
        if self._guard is not None and pure_noise:
            raise ValueError(
                "guard: the sampler's first step is pure noise (zero terminal SNR), "
                "where epsilon says nothing of the prompt"
            )
        self._latents = latents

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hooks on the denoiser inside the block, none after it."""
        if self._pipe.unet._compiled_call_impl is not None:
            raise UnsupportedModelError(
                "unet: it was compiled in place and runs no hooks; use pipe.unet = torch.compile(pipe.unet)"
            )
        with self._hooks:
            hook = self._pipe.unet.register_forward_hook(self._see, with_kwargs=True)
            self._hooks.callback(hook.remove)
            yield

    def noise_norms(self) -> Tensor | None:
        """(N, calls of the denoiser) float32 on the CPU, None unless tracked."""
        return torch.stack(self._norms, dim=1).float().cpu() if self._track else None

    def _see(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        if self._responding:
            return None
        if not self._pipe.do_classifier_free_guidance:  # switched off by a callback, as some do near the end
            self._norms.append(torch.full_like(self._norms[0], torch.nan))
            return None
        uncond, cond = output[0].chunk(2)
        scale = self._epsilon_scale(args[1])
        magnitude = ops.guidance_magnitude(cond, uncond).difference * scale
        step = Step(unet, args, kwargs, output[0], self._pipe.guidance_scale, scale, magnitude)
        self._norms.append(magnitude)
        if self._guard is not None and self.flagged is None:
            step = self._decide(step, self._guard)
        if self._conditional is None:
            return None
        return (torch.cat((step.uncond, self._conditional(step))), *output[1:])

    def _decide(self, step: Step, guard: Guard) -> Step:
        rows = step.magnitude > guard.threshold
        self.flagged = rows.cpu()  # the one read of the whole call
        if not self.flagged.any():
            return step
        flagged = Flagged(rows, self.flagged, guard, self._pipe, self._prompts, self._latents, self._hooks)
        self._responding = True
        try:
            step, self._conditional = RESPONSES[guard.mitigation](step, flagged)
        finally:
            self._responding = False
        return step

    def _epsilon_scale(self, timestep: Tensor) -> Tensor | float:
        """`NoiseSchedule.epsilon_scale`, also between its timesteps, where some samplers step."""
        if self._schedule.prediction_type == "epsilon":
            return 1.0
        below = timestep.floor().long()
        above = (below + 1).clamp(max=self._schedule.num_train_timesteps - 1)
        lower, upper = self._schedule.epsilon_scale(torch.stack((below, above)))
        return torch.lerp(lower, upper, (timestep - below).double())
