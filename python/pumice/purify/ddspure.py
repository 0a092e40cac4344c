"""DDSPure: as much noise as the perturbation could have, and denoised (Carlini et al., ICLR 2023)."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from pumice.models import NoiseSchedule, load_denoiser
from pumice.models.arguments import check_budget

from .fitting import Size, fitted, unfitted
from .pictures import Pictures
from .pixels import PixelSampler
from .sampler import Options
from .walk import Sampler, check_default_walk, rescheduled, walk


def ddspure(
    images: Any,
    denoiser: Any,
    *,
    eps: float = 11 / 255,
    sampler: Sampler = "ddpm",
    num_inference_steps: int | None = None,
    variant: Literal["official", "ds"] = "official",
    size: Size = "resize",
    **options: Unpack[Options],
) -> Any:
    """Purify pictures by diffusion in pixels with the noise of a perturbation's budget.

    ::

        x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise,  abar_t next to 1 / (1 + (2 eps)^2),  then back to x_0

    so that the noise in x_t / sqrt(abar_t) has the standard deviation eps in [0, 1], 2 eps in the [-1, 1] of
    the network (diffusion denoised smoothing, Carlini et al., arXiv:2206.10550). The way back is that of
    `diffpure`; the paper's is sampler="one_shot".

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        denoiser: as of `models.load_denoiser`.
        eps: the budget that the pictures are thought to be perturbed by. Default 11/255, that of published
            evaluations of protections.
        sampler, num_inference_steps: as of `diffpure`.
        variant: "ds" is their own code, with other results: the index is that of 1 / (1 + eps^2), half the
            noise, counted from 1 (2, 6, 10, 16 for eps of 4, 8, 11, 16 levels), and taken for one of a
            schedule of 250, three times the noise; and, as `gridpure`'s, it passes pictures in [0, 1] to a
            model of [-1, 1] and leaves out the last step. It takes no `sampler`.
        size: as of `diffpure`.
        options: `purify.Options`.

    Returns:
        The purified pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: for a denoiser that is none of pixels.
    """
    model = load_denoiser(denoiser)
    check_budget("eps", eps)
    if variant not in ("official", "ds"):
        raise ValueError(f"variant: got {variant!r}, expected 'official' or 'ds'")
    ds = variant == "ds"
    if not ds:
        path = walk(model.schedule, timestep_of(model.schedule, 2 * eps), sampler, num_inference_steps)
    else:
        check_default_walk(sampler, num_inference_steps)
        path = rescheduled(model.schedule, timestep_of(model.schedule, eps) + 1)
    pictures = Pictures(images)
    rows = [fitted(picture, model.size, model.multiple, size) for picture in pictures.given]
    job = PixelSampler(model, [1] * len(rows), **options)
    if ds:  # [0, 1] reaches the model
        purified = [(row * 2 - 1).clamp(0, 1) for row in job([row / 2 + 0.5 for row in rows], path)]
    else:
        purified = job(rows, path)
    return pictures.finish(
        [unfitted(now, was, size) for now, was in zip(purified, pictures.given, strict=True)]
    )


def timestep_of(schedule: NoiseSchedule, delta: float) -> int:
    """The timestep whose abar is next to 1 / (1 + delta^2): noise of delta in the unit of the network."""
    return int((schedule.alphas_cumprod - 1 / (1 + delta**2)).abs().argmin())
