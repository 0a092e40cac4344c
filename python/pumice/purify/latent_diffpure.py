"""DiffPure in latents: a text-to-image model noises a picture and denoises it towards a prompt."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from pumice import models
from pumice.models import Denoised, DiffusionModel, PromptEmbeds
from pumice.models.arguments import check_prompt, check_scale, checked_count, checked_prompt

from .fitting import Size, check_size, fitted, unfitted
from .latents import LatentSampler
from .pictures import Pictures
from .sampler import Denoise, Options
from .walk import Sampler, walk

QUALITY_PROMPT = "a photo of a {}, clear, high resolution, high quality, noise-free"


def latent_diffpure(
    images: Any,
    pipe: Any,
    prompt: str = "",
    *,
    negative_prompt: str = "",
    t: int = 300,
    guidance_scale: float = 7.5,
    sampler: Sampler = "ddpm",
    num_inference_steps: int | None = None,
    size: Size = "resize",
    **options: Unpack[Options],
) -> Any:
    """Purify pictures by diffusion in a model's latents.

    ::

        z_t = sqrt(abar_t) z + sqrt(1 - abar_t) noise,   z a sample of E(x);   t + 1 ancestral steps;   D(z_0)
        epsilon = epsilon(z, t, negative) + guidance_scale (epsilon(z, t, prompt) - epsilon(z, t, negative))

    as the evaluations of protections do it with Stable Diffusion 1.4 (their defaults), after DiffPure (Nie et
    al., arXiv:2205.07460). Variances are the smaller ones of DDPM, those of the true posterior. Both branches
    of the guidance are one batch; where they are identical, one of them is left out.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths. Tensors are taken as they are, their sides
            multiples of the autoencoder's factor.
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel.
        prompt: what is drawn to. Default "", their variant without a prompt; the other one is
            `QUALITY_PROMPT.format("person")`, or whatever the class is.
        negative_prompt: what is drawn away from. Default "".
        t: the timestep that pictures are noised to. Default 300; for Stable Diffusion abar is 0.59 there.
        guidance_scale: default 7.5.
        sampler: "ddpm", theirs, passes the network t + 1 times, "dpmsolver++" `num_inference_steps` times,
            default 30, and "one_shot" once.
        num_inference_steps: of "dpmsolver++".
        size: how PIL images and files meet the model: "resize" makes the shorter side its own and resizes the
            result back, "native" mirrors them up to what the autoencoder takes.
        options: `purify.Options`. Of guided pictures, each is two rows of a pass.

    Returns:
        The purified pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: if the model's family is not supported.
    """
    check_scale("guidance_scale", guidance_scale)
    check_prompt("prompt", prompt)
    check_prompt("negative_prompt", negative_prompt)
    check_size(size)
    model = models.load(pipe)
    path = walk(model.schedule, checked_count("t", t, least=0), sampler, num_inference_steps)
    pictures = Pictures(images)
    own = min(model.latent_shape()[1:]) * model.vae_scale_factor
    if pictures.tensor:
        _check_sides(images, model.vae_scale_factor)
        rows = pictures.given
    else:
        rows = [fitted(picture, own, model.vae_scale_factor, size) for picture in pictures.given]
    embeds, negative = checked_prompt(model, prompt), _negative(model, negative_prompt)
    if guidance_scale == 1 or _equal(embeds, negative):
        denoise = _denoiser(model, embeds)
    else:
        denoise = _guided(model, embeds, negative, guidance_scale)
    purified = LatentSampler(model, denoise, len(rows), **options)(rows, path)
    if not pictures.tensor:
        purified = [unfitted(now, was, size) for now, was in zip(purified, pictures.given, strict=True)]
    return pictures.finish(purified)


def _denoiser(model: DiffusionModel, embeds: PromptEmbeds) -> Denoise:
    def denoise(x: Tensor, timestep: Tensor) -> Denoised:
        return Denoised(model.schedule.to_x0(model.predict(x, timestep, embeds), x, timestep), None)

    return denoise


def _guided(model: DiffusionModel, embeds: PromptEmbeds, negative: PromptEmbeds, scale: float) -> Denoise:
    def denoise(x: Tensor, timestep: Tensor) -> Denoised:
        count = len(x)
        both = PromptEmbeds.cat([negative] * count + [embeds] * count)
        away, to = model.predict(torch.cat((x, x)), timestep, both).to(x.dtype).chunk(2)
        return Denoised(model.schedule.to_x0(away + scale * (to - away), x, timestep), None)

    return denoise


def _check_sides(images: Tensor, multiple: int) -> None:
    height, width = images.shape[2:]
    if height % multiple or width % multiple:
        raise ValueError(f"images: got {height} x {width} pixels, expected multiples of {multiple}")


def _equal(a: PromptEmbeds, b: PromptEmbeds) -> bool:
    """Not so for "" of models whose pipelines have zeros for no prompt."""
    pairs = ((a.embeds, b.embeds), (a.pooled, b.pooled))
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def _negative(model: DiffusionModel, prompt: str) -> PromptEmbeds:
    """That of no prompt is the pipeline's own."""
    if prompt:
        return checked_prompt(model, prompt, "negative_prompt")
    with model.frozen(), torch.no_grad():
        return model.unconditional()
