"""DiffPure (Nie et al., ICML 2022): noise a picture until a perturbation drowns, and denoise it."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from torch import Tensor

from pumice.models import PixelDenoiser, load_denoiser
from pumice.models.arguments import checked_count

from .pictures import Pictures, mirrored, resized
from .pixels import PixelSampler
from .sampler import Options
from .walk import Sampler, walk

Size = Literal["resize", "native"]


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
    path = walk(model.schedule, checked_count("t", t) - 1, sampler, num_inference_steps)
    pictures = Pictures(images)
    rows = [_fitted(picture, model, size) for picture in pictures.given]
    job = PixelSampler(model, [1] * len(rows), **options)
    purified = job(rows, path)
    return pictures.finish([_back(now, was, size) for now, was in zip(purified, pictures.given, strict=True)])


def _fitted(picture: Tensor, model: PixelDenoiser, size: Size) -> Tensor:
    """A picture of a size that the model takes."""
    if size not in ("resize", "native"):
        raise ValueError(f"size: got {size!r}, expected 'resize' or 'native'")
    height, width, multiple = *picture.shape[1:], model.multiple
    if size == "native":
        return mirrored(picture, (-(-height // multiple) * multiple, -(-width // multiple) * multiple))
    if model.size is None:
        raise ValueError("size: got 'resize' for a denoiser that has no size of its own, expected 'native'")
    scale = model.size / min(height, width)
    sides = [max(model.size, round(side * scale / multiple) * multiple) for side in (height, width)]
    return resized(picture, (sides[0], sides[1]))


def _back(now: Tensor, was: Tensor, size: Size) -> Tensor:
    height, width = was.shape[1:]
    return resized(now, (height, width)) if size == "resize" else now[:, :height, :width]
