"""Losses of the latents of pictures: they meet in one cotangent, and the encoder is passed once a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pumice.models import DiffusionModel, PromptEmbeds
from pumice.models.draws import Draws


class LatentObjective:
    """What grows along the gradient of a loss of the latents, as `pgd.PGD` climbs it.

    Args:
        model: whose encoder, and denoiser, pictures are protected against.
        cotangent: dloss/dz of latents z (n, C, h, w). Takes z, then, if `noised`, timesteps t (n,) and noise
            (n, C, h, w), then the rows of `constants`.
        sample: take a sample of the encoder's posterior at each step, not its mean.
        noised: draw t and noise at each step.
        constants: one list for each, with a tensor for each picture: targets, for example.
    """

    def __init__(
        self,
        model: DiffusionModel,
        cotangent: Callable[..., Tensor],
        *,
        sample: bool,
        noised: bool,
        constants: Sequence[Sequence[Tensor]] = (),
    ) -> None:
        self.model = model
        self.noised = noised
        self._cotangent, self._sample = cotangent, sample
        self._constants = constants

    def inputs(
        self,
        pictures: Sequence[int],
        step: int,
        size: tuple[int, int],
        draws: Draws,
        timesteps: Sequence[Tensor] | None,
    ) -> tuple[Tensor, ...]:
        """What `gradient` takes beside the pictures: drawn, or looked up.

        Args:
            pictures: their numbers.
            step: the number of the step.
            size: (H, W) of the pictures.
            draws: random numbers.
            timesteps: for each picture those that t is drawn from; None for all.
        """
        shape = self.model.latent_shape(*size)
        found = []
        if self._sample:
            found.append(draws.normal(pictures, "posterior", step, shape))
        if self.noised:
            found.append(self._drawn_timesteps(pictures, step, draws, timesteps))
            found.append(draws.normal(pictures, "noise", step, shape))
        found += [torch.stack([rows[picture] for picture in pictures]) for rows in self._constants]
        return tuple(found)

    def gradient(self, images: Tensor, *inputs: Tensor, recompute: bool = False) -> Tensor:
        """dloss/dimages, (n, 3, H, W)."""
        noise, rest = (inputs[0], inputs[1:]) if self._sample else (None, inputs)
        return self.model.vjp(images, lambda z: self._cotangent(z, *rest), noise=noise, recompute=recompute)

    def _drawn_timesteps(
        self, pictures: Sequence[int], step: int, draws: Draws, timesteps: Sequence[Tensor] | None
    ) -> Tensor:
        if timesteps is None:
            return draws.integers(pictures, "timestep", step, self.model.schedule.num_train_timesteps)
        share = draws.uniform(pictures, "timestep", step)
        allowed = [timesteps[picture] for picture in pictures]
        # not t[index], which would read the index back from the GPU
        return torch.stack([t.take((u * len(t)).long()) for u, t in zip(share, allowed, strict=True)])


def denoising_gradient(
    model: DiffusionModel, z: Tensor, t: Tensor, noise: Tensor, prompt_embeds: PromptEmbeds
) -> Tensor:
    """The gradient in z of sum |prediction(z_t) - target|^2 over each picture, float32 (n, C, h, w).

    The denoiser is passed forward and backward; with v-prediction the target moves with z, too.
    """
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        output = model.predict(model.add_noise(z, noise, t), t, prompt_embeds)
        loss = (output.to(z.dtype) - model.schedule.target(z, noise, t)).square().sum()
    (gradient,) = torch.autograd.grad(loss, z)
    return gradient


@torch.no_grad()
def score_difference(
    model: DiffusionModel, z: Tensor, t: Tensor, noise: Tensor, prompt_embeds: PromptEmbeds
) -> Tensor:
    """epsilon_theta(z_t) - epsilon, float32 (n, C, h, w): the denoiser is passed forward only."""
    return model.predict_noise(model.add_noise(z, noise, t), t, prompt_embeds) - noise
