"""Noisy upscaling (Hönig et al., ICLR 2025): noise over the protection, and an upscaler removes both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, get_args

import torch

from pumice.models.arguments import check_budget
from pumice.models.draws import Draws

from .fitting import unfitted
from .pictures import Pictures
from .sampler import Options
from .upscaling import Upscaling

Output = Literal["input", "upscaled"]


def noisy_upscaling(
    images: Any,
    upscaler: Any,
    prompt: str | Sequence[str] = "",
    *,
    noise: float = 0.1,
    noise_level: int = 320,
    num_inference_steps: int = 75,
    guidance_scale: float = 9.0,
    negative_prompt: str | None = None,
    output: Output = "input",
    **options: Unpack[Options],
) -> Any:
    """Purify pictures by Gaussian noise and an upscaler that takes it for the grain of a small picture.

    ::

        x <- resize(upscale(clip(x + noise N(0, 1), 0, 1)))

    (Hönig et al., arXiv:2406.12027). The work is that of drawing a picture of sixteen times the pixels: of
    512 px, 2048 px, for which `pipe.vae.enable_tiling()` bounds the memory.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        upscaler: a `StableDiffusionUpscalePipeline` or the path of one; its own settings (tiling, attention,
            offloading) hold.
        prompt: what is on the pictures, or one for each. The authors take captions; without one, the default,
            there is no guidance, and half of the work.
        noise: standard deviation, in the unit of the pictures. Default 0.1, the authors'.
        noise_level: what the upscaler is told and adds itself. Default 320, the authors'.
        num_inference_steps, guidance_scale: default 75 and 9, the pipeline's own, which the authors leave.
        negative_prompt: what is drawn away from.
        output: "input" resizes the result to the size of what was given; "upscaled", of tensors only, leaves
            it four times as large, as the authors do.
        options: `purify.Options`. Of guided pictures, each is two rows of a pass; by default fewer go into
            one the more pixels they have.

    Returns:
        The purified pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: for a pipeline of another kind.
    """
    check_budget("noise", noise)
    if output not in get_args(Output):
        raise ValueError(f"output: got {output!r}, expected one of {', '.join(get_args(Output))}")
    pictures = Pictures(images)
    if output == "upscaled" and not pictures.tensor:
        raise ValueError("output: got 'upscaled' for PIL images or paths, expected a tensor of pictures")
    upscaling = Upscaling(
        upscaler,
        len(pictures),
        prompt,
        noise_level=noise_level,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        **options,
    )
    draws = Draws([str(seed) for seed in upscaling.seeds], torch.device("cpu"))
    noisy = [
        (given + noise * draws.normal([number], "noise", 0, given.shape)[0].to(given.device)).clamp(0, 1)
        for number, given in enumerate(pictures.given)
    ]
    made = upscaling(noisy)
    if output == "input":
        made = [unfitted(now, was, "resize") for now, was in zip(made, pictures.given, strict=True)]
    return pictures.finish(made)
