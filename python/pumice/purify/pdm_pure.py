"""PDM-Pure (Xue and Chen, 2024): diffusion in pixels, which protections of latents do not reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

from torch import Tensor
from tqdm.auto import tqdm

from pumice.models import NoiseSchedule, PixelDenoiser, frozen, load_denoiser
from pumice.models.arguments import check_prompt, check_scale, checked_count
from pumice.models.deep_floyd import DeepFloyd, is_deep_floyd

from .fitting import fitted, unfitted
from .pictures import Pictures
from .pixels import PixelSampler
from .sampler import Options, Sampler
from .upscaling import Upscaling
from .walk import Walk, ancestral, first_of


def pdm_pure(
    images: Any,
    denoiser: Any,
    upscaler: Any = None,
    *,
    t: int = 100,
    num_inference_steps: int = 10,
    prompt: str = "a picture",
    guidance_scale: float = 7.0,
    noise_level: int = 250,
    less_qsample_steps: int = 0,
    **options: Unpack[Options],
) -> Any:
    """Purify pictures by a little diffusion in pixels, and make them large again by an upscaler.

    ::

        x_t = sqrt(abar_{t-1}) x + sqrt(1 - abar_{t-1}) noise,   a few ancestral steps back to x_0
        x <- resize(upscale(x_0))

    (Xue and Chen, arXiv:2404.13320). Pictures are purified with their shorter side at the model's own size.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        denoiser: an `IFSuperResolutionPipeline`, the second stage of DeepFloyd IF that the authors take, or
            the path of one, which opens it in float32 on the CPU; it sees the picture at a fourth of the
            sides, too. Its x0 is clipped to the range of pictures, where its pipeline cuts at a quantile of
            the values and rescales. Or an unconditional one as of `models.load_denoiser`.
        upscaler: a `StableDiffusionUpscalePipeline` or the path of one, for four times the sides (50 steps,
            guidance 4, noise level 20) before the result is resized to that of what was given. Default none:
            it is resized at once.
        t: how many steps of the schedule. Default 100, a tenth of it, the authors'.
        num_inference_steps: how many of them are taken, spread over 0 to t - 1. Default 10, the authors'.
        prompt: of DeepFloyd IF and the upscaler. Default the authors'.
        guidance_scale: of DeepFloyd IF. Default 7, the authors'.
        noise_level: of the small picture that DeepFloyd IF sees, of 1000. Default 250, the pipeline's.
        less_qsample_steps: noise pictures to a step that is so many before the first one taken, so that the
            first steps remove more than there is; default 0. The released code has 5: noise of step 44
            instead of 99.
        options: `purify.Options`. Of guided pictures, each is two rows of a pass.

    Returns:
        The purified pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: for a denoiser that is none of pixels, or an upscaler of another kind.
    """
    check_prompt("prompt", prompt)
    check_scale("guidance_scale", guidance_scale)
    checked_count("noise_level", noise_level, least=0)
    model: PixelDenoiser
    if is_deep_floyd(denoiser):
        model = DeepFloyd(denoiser, prompt=prompt, guidance_scale=guidance_scale, noise_level=noise_level)
    else:
        model = load_denoiser(denoiser)
    path = _walk(model.schedule, t, num_inference_steps, less_qsample_steps)
    pictures = Pictures(images)
    second = None
    if upscaler is not None:
        second = Upscaling(
            upscaler,
            len(pictures),
            prompt,
            noise_level=20,
            num_inference_steps=50,
            guidance_scale=4.0,
            **options,
        )
    rows = [fitted(each, model.size, model.multiple, "resize") for each in pictures.given]
    if isinstance(model, DeepFloyd):
        made = _conditioned(model, rows, path, **options)
    else:
        made = PixelSampler(model, [1] * len(rows), **options)(rows, path)
    if second is not None:
        made = second(made)
    return pictures.finish(
        [unfitted(now, was, "resize") for now, was in zip(made, pictures.given, strict=True)]
    )


def _walk(schedule: NoiseSchedule, t: int, steps: int, less: int) -> Walk:
    """Ancestral steps over a few timesteps of the first t, from what is noised to one of them."""
    first = first_of(schedule, t)
    if checked_count("num_inference_steps", steps) > t:
        raise ValueError(f"num_inference_steps: got {steps}, expected at most {t}, t")
    if checked_count("less_qsample_steps", less, least=0) >= steps:
        raise ValueError(f"less_qsample_steps: got {less}, expected at most {steps - 1}, the steps but one")
    # as guided diffusion spaces them, halves rounded to even; a single one is that of t
    taken = [round(n * first / (steps - 1)) for n in range(steps)] if steps > 1 else [first]
    alpha, sigma = schedule.alpha_sigma(taken[-1 - less])
    return replace(ancestral(schedule, taken[::-1]), alpha=float(alpha), sigma=float(sigma))


class _Shown(Sampler):
    """A sampler of a model that is shown the pictures which it is to denoise."""

    def __init__(self, model: DeepFloyd, count: int, **options: Any) -> None:
        super().__init__(model, [1] * count, model.device, **options)
        self._model = model

    def _walked(self, numbers: Sequence[int], x: Tensor, walk: Walk, round: int) -> Tensor:
        noise = self.draws.normal(numbers, "small picture", round, x.shape[1:])
        self._model.see(x.to(noise.device), noise)
        return super()._walked(numbers, x, walk, round)


def _conditioned(
    model: DeepFloyd,
    rows: Sequence[Tensor],
    walk: Walk,
    *,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> list[Tensor]:
    rows = [row * 2 - 1 for row in rows]
    sampler = _Shown(model, len(rows), seed=seed, batch_size=batch_size)
    with frozen([model.unet]), tqdm(total=len(rows), unit="row", disable=not progress) as bar:
        return [(row / 2 + 0.5).clamp(0, 1) for row in sampler(rows, walk, tick=bar.update)]
