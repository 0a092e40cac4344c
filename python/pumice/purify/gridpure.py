"""GrIDPure (Zhao et al., CVPR 2024): many small purifications of overlapping parts of a picture."""

from __future__ import annotations

from typing import Any, Literal, Unpack

from torch import Tensor

from pumice.models import load_denoiser
from pumice.models.arguments import check_number, checked_count

from .fitting import ceiled
from .grid import Grid
from .pictures import Pictures, mirrored
from .pixels import PixelSampler
from .sampler import Options
from .walk import Sampler, check_default_walk, first_of, rescheduled, walk


def gridpure(
    images: Any,
    denoiser: Any,
    *,
    t: int = 10,
    iterations: int = 20,
    gamma: float = 0.1,
    sampler: Sampler = "ddpm",
    num_inference_steps: int | None = None,
    variant: Literal["official", "ds"] = "official",
    faithful_quantize: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Purify pictures of any size by many rounds of a little noise, part by part.

    ::

        x <- (1 - gamma) merge(diffpure(split(x), t)) + gamma x        `iterations` times

    (Zhao et al., arXiv:2312.00084). Parts are boxes of the model's own size, half a box apart, and one more
    that is made of the picture's four corners; where boxes overlap, the mean counts. All boxes of all
    pictures are one batch, and pictures stay floating between iterations.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        denoiser: as of `models.load_denoiser`.
        t: steps of the schedule that a round takes. Default 10, as the published evaluations call it.
        iterations: default 20, of the same.
        gamma: of the picture before the round. Default 0.1, of the same.
        sampler: "ddpm" is the authors'; "one_shot" needs one pass a round instead of t, "dpmsolver++" as many
            as `num_inference_steps`.
        num_inference_steps: of "dpmsolver++".
        variant: "ds" is a widely used re-implementation with other results: no box of corners, pictures in
            [0, 1] for a model of [-1, 1], timesteps of a schedule of 250 (index 10 is t = 40, three times the
            noise), and the last step left out. It takes no `sampler`. Values out of range are cut, where the
            re-implementation lets bytes wrap around.
        faithful_quantize: cut to 8 bits after each iteration, as the released code does, which darkens by
            half a level each time.
        options: `purify.Options`.

    Returns:
        The purified pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: for a denoiser that is none of pixels.
    """
    model = load_denoiser(denoiser)
    check_number("gamma", gamma)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma: got {gamma}, expected 0 to 1")
    if variant not in ("official", "ds"):
        raise ValueError(f"variant: got {variant!r}, expected 'official' or 'ds'")
    if model.size is None:
        raise ValueError("denoiser: it does not say which size it has, expected one with a sample_size")
    iterations = checked_count("iterations", iterations)
    if variant == "ds":
        check_default_walk(sampler, num_inference_steps)
        path = rescheduled(model.schedule, checked_count("t", t))
    else:
        path = walk(model.schedule, first_of(model.schedule, t), sampler, num_inference_steps)
    pictures = Pictures(images)
    side = ceiled(model.size, model.multiple)
    grids = [_grid(picture, side, corners=variant == "official") for picture in pictures.given]
    whole = [
        mirrored(picture, (grid.height, grid.width)).to(model.device)
        for picture, grid in zip(pictures.given, grids, strict=True)
    ]
    job = PixelSampler(model, [len(grid) for grid in grids], rounds=iterations, **options)
    for _ in range(iterations):
        boxes = [box for picture, grid in zip(whole, grids, strict=True) for box in grid.split(picture)]
        if variant == "ds":
            boxes = [box / 2 + 0.5 for box in boxes]  # [0, 1] reaches the model
        purified = iter(job(boxes, path))
        for number, grid in enumerate(grids):
            merged = grid.merge([next(purified) for _ in range(len(grid))])
            if variant == "ds":
                merged = (merged * 2 - 1).clamp(0, 1)
            mixed = (1 - gamma) * merged + gamma * whole[number]
            whole[number] = (mixed * 255).clamp(0, 255).floor() / 255 if faithful_quantize else mixed
    return pictures.finish(
        [now[:, : was.shape[1], : was.shape[2]] for now, was in zip(whole, pictures.given, strict=True)]
    )


def _grid(picture: Tensor, side: int, *, corners: bool) -> Grid:
    height, width = (max(side, length) for length in picture.shape[1:])
    return Grid(height, width, side, side // 2, corners)
