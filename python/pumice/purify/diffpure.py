"""DiffPure (Nie et al., ICML 2022): noise a picture until a perturbation drowns, and denoise it."""

from __future__ import annotations

from typing import Any, Unpack

from pumice.models import load_denoiser

from .fitting import Size, fitted, unfitted
from .pictures import Pictures
from .pixels import PixelSampler
from .sampler import Options
from .walk import Sampler, first_of, walk


def diffpure(
    images: Any,
    denoiser: Any,
    *,
    t: int = 150,
    sampler: Sampler = "ddpm",
    num_inference_steps: int | None = None,
    size: Size = "resize",
    **options: Unpack[Options],
) -> Any:
    """Purify pictures by diffusion in pixels.

    ::

        x_t = sqrt(abar_{t-1}) x + sqrt(1 - abar_{t-1}) noise,   then t ancestral steps back to x_0

    (Nie et al., arXiv:2205.07460), the variance as the model has learned it, x0 clipped to the range of
    pictures in each step.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        denoiser: as of `models.load_denoiser`.
        t: how many steps of the schedule. Default 150, of the authors for ImageNet at 4/255; 100 is common
            against protections. Noise of standard deviation 0.46 (t = 150) or 0.32 (100) in [-1, 1].
        sampler: "ddpm" is the authors'; "dpmsolver++" takes `num_inference_steps` instead of t, default 30,
            and "one_shot" one.
        num_inference_steps: of "dpmsolver++".
        size: "resize" makes the shorter side the model's own, as the authors do, and resizes the result back,
            which costs detail; "native" keeps pictures as large as they are.
        options: `purify.Options`.

    Returns:
        The purified pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: for a denoiser that is none of pixels.
    """
    model = load_denoiser(denoiser)
    path = walk(model.schedule, first_of(model.schedule, t), sampler, num_inference_steps)
    pictures = Pictures(images)
    rows = [fitted(picture, model.size, model.multiple, size) for picture in pictures.given]
    purified = PixelSampler(model, [1] * len(rows), **options)(rows, path)
    return pictures.finish(
        [unfitted(now, was, size) for now, was in zip(purified, pictures.given, strict=True)]
    )
