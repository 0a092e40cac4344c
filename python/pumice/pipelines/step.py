"""One call of the denoiser inside a running sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Step:
    """What the denoiser was called with and gave, 2N rows: [unconditional x N, conditional x N].

    Attributes:
        unet: the denoiser.
        args, kwargs: of the call, by diffusers' pipelines: latents, timestep, encoder_hidden_states=, ...
        output: (2N, C, h, w), what it predicted.
        guidance_scale: that the sampler is about to apply.
        epsilon_scale: what makes a difference of two outputs one of epsilons.
        magnitude: (N,) float32, |epsilon_cond - epsilon_uncond|.
    """

    unet: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    guidance_scale: float
    epsilon_scale: Tensor | float
    magnitude: Tensor

    @property
    def uncond(self) -> Tensor:
        return self.output.chunk(2)[0]

    @property
    def cond(self) -> Tensor:
        return self.output.chunk(2)[1]

    @property
    def latents(self) -> Tensor:
        """(N, C, h, w), scaled as the denoiser takes them: of unit variance at the first step."""
        latents: Tensor = self.args[0]
        return latents.chunk(2)[0]

    @property
    def timestep(self) -> Tensor:
        """Of no dimension; a float in some samplers."""
        return torch.as_tensor(self.args[1])

    @property
    def direction(self) -> Tensor:
        """(N, C, h, w) float32, epsilon_cond - epsilon_uncond."""
        return (self.cond.float() - self.uncond.float()) * self.epsilon_scale

    @property
    def embeds(self) -> Tensor:
        """(2N, L, D)."""
        embeds: Tensor = self.kwargs["encoder_hidden_states"]
        return embeds

    def again(self, samples: Tensor, *, latents: Tensor | None = None, embeds: Tensor | None = None) -> Step:
        """The call once more with other `latents` (N, ...) or `embeds` (2N, ...), for these of the N samples.

        The others keep their predictions to the bit.
        """
        args = self.args if latents is None else (torch.cat((latents, latents)), *self.args[1:])
        kwargs = self.kwargs if embeds is None else self.kwargs | {"encoder_hidden_states": embeds}
        # not unet(...), whose hooks have seen this step
        output = self.unet.forward(*args, **kwargs)[0]
        rows = samples.repeat(2).view(-1, 1, 1, 1)
        return replace(self, args=args, kwargs=kwargs, output=torch.where(rows, output, self.output))
