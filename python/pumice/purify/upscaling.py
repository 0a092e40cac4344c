"""Pictures through an upscaler: the engine of the purifiers that draw them anew from small ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice.models import RowBudget
from pumice.models.arguments import check_prompt, check_scale, checked_count, checked_seeds
from pumice.models.upscaler import FACTOR, Upscaler, load_upscaler

from .batches import in_batches
from .fitting import fitted
from .sampler import ROWS

_AREA = 128**2  # px of the pictures that ROWS is meant for


class Upscaling:
    """An upscaler with its settings, checked before anything is done.

    Args:
        upscaler: as of `models.upscaler.load_upscaler`.
        count: of pictures.
        prompt: of all pictures, or one for each.
        negative_prompt: what is drawn away from; None is no text.
        noise_level: of the small pictures, in steps of their schedule.
        num_inference_steps, guidance_scale: of the pipeline. Where all prompts are the negative one, guidance
            changes nothing, and its branch is left out.
        seed, batch_size, progress: `Options`; by default a pass has fewer rows than theirs if they are large.
    """

    def __init__(
        self,
        upscaler: Any,
        count: int,
        prompt: str | Sequence[str],
        *,
        noise_level: int,
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> None:
        self._upscaler = Upscaler(load_upscaler(upscaler))
        self.device = self._upscaler.device
        self.seeds = checked_seeds(seed, count)
        self._prompts = _prompts(prompt, count)
        check_prompt("negative_prompt", negative_prompt or "")
        self._negative = negative_prompt or ""
        check_scale("guidance_scale", guidance_scale)
        self._settings = {
            "noise_level": _within("noise_level", noise_level, 0, self._upscaler.max_noise_level),
            "num_inference_steps": _within(
                "num_inference_steps", num_inference_steps, 1, self._upscaler.max_steps
            ),
            "guidance_scale": guidance_scale,
        }
        self._guided = guidance_scale > 1 and any(each != self._negative for each in self._prompts)
        self._batch_size = None if batch_size is None else checked_count("batch_size", batch_size)
        self._progress = progress

    def budget(self, pictures: Sequence[Tensor]) -> RowBudget:
        """How many of these pictures, (3, h, w) each, go into a pass."""
        area = max(each.shape[1] * each.shape[2] for each in pictures)
        return RowBudget(self._batch_size or max(1, min(ROWS, ROWS * _AREA // area)))

    def __call__(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Pictures (3, h, w) in [0, 1] to (3, 4 h, 4 w), by way of sides that the network takes."""
        rows = [fitted(each, None, self._upscaler.multiple, "native") for each in pictures]
        texts = {text: self._upscaler.encode(text) for text in {*self._prompts, self._negative}}
        with tqdm(total=len(rows), unit="picture", disable=not self._progress) as bar:

            def larger(numbers: Sequence[int], images: Tensor) -> Tensor:
                embeds = torch.cat([texts[self._prompts[n]] for n in numbers])
                negative = texts[self._negative].expand(len(numbers), -1, -1) if self._guided else None
                seeds = [self.seeds[n] for n in numbers]
                return self._upscaler(images, embeds, negative, seeds, **self._settings).to(images.device)

            made = in_batches(rows, self.budget(rows), larger, bar.update)
        return [
            large[:, : FACTOR * small.shape[1], : FACTOR * small.shape[2]]
            for large, small in zip(made, pictures, strict=True)
        ]


def _prompts(prompt: str | Sequence[str], count: int) -> list[str]:
    prompts: list[Any] = list(prompt) if isinstance(prompt, list | tuple) else [prompt] * count
    for each in prompts:
        check_prompt("prompt", each)
    if len(prompts) != count:
        raise ValueError(f"prompt: got {len(prompts)}, expected one, or one for each of {count} pictures")
    return prompts


def _within(name: str, value: int, least: int, most: int) -> int:
    if checked_count(name, value, least=least) > most:
        raise ValueError(f"{name}: got {value}, expected at most {most}, the upscaler's own")
    return value
