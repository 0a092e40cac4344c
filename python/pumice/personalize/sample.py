"""Drawings of what a model has learned, without the noise that it was learned with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice.models import RowBudget
from pumice.models.arguments import check_prompt, check_scale, checked_count, first_seed
from pumice.models.drawing import draw

from .decoupling import NEGATIVE_PROMPT, without_noise
from .result import Personalized


def sample(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    noise_phrase: str | None = None,
    negative_prompt: str | None = NEGATIVE_PROMPT,
    num_images: int = 16,
    num_inference_steps: int = 100,
    guidance_scale: float = 7.5,
    seed: int = 0,
    rows: int = 16,
    progress: bool = False,
) -> Tensor:
    """Draw a subject by quality-enhanced sampling (arXiv:2406.18944).

    ::

        eps = eps(negative_prompt) + guidance_scale (eps("prompt, without V") - eps(negative_prompt))

    with the pipeline's own scheduler. Without a noise phrase V, as after plain DreamBooth, prompts stay as
    they are.

    Args:
        pipe: a `Personalized`, a text-to-image pipeline, a path or a hub id.
        prompts: P of them.
        noise_phrase: V. Default that of the `Personalized`; "" for none.
        negative_prompt: what to guide away from. Default `personalize.NEGATIVE_PROMPT`, of the paper's code;
            None or "" for nothing.
        num_images: D for each prompt. Default 16, of the same.
        num_inference_steps: default 100, of the same.
        guidance_scale: default 7.5, of the same; 1 goes without guidance.
        seed: picture d of each prompt starts from `torch.Generator().manual_seed(seed * num_images + d)`.
        rows: pictures drawn in one call; halved on out-of-memory.
        progress: show a bar.

    Returns:
        (P, D, 3, H, W) uint8 on the CPU.

    Differences from the code: it says "without V" also where nothing was learned with V.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind, and if what is
            drawn is not finite.
        UnsupportedModelError: if the pipeline does not draw from text alone.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("prompts: got an empty list, expected at least one prompt")
    for text in texts:
        check_prompt("prompts", text)
    for name, phrase in {"noise_phrase": noise_phrase, "negative_prompt": negative_prompt}.items():
        if phrase is not None:
            check_prompt(name, phrase)
    num_images = checked_count("num_images", num_images)
    num_inference_steps = checked_count("num_inference_steps", num_inference_steps)
    check_scale("guidance_scale", guidance_scale)
    budget = RowBudget(checked_count("rows", rows))
    first = first_seed(seed) * num_images
    if noise_phrase is None and isinstance(pipe, Personalized):
        noise_phrase = pipe.noise_phrase
    model = models.load(pipe.pipe if isinstance(pipe, Personalized) else pipe)
    model.check_text_to_image()
    left = [
        (without_noise(text, noise_phrase), seed)
        for text in texts
        for seed in range(first, first + num_images)
    ]
    inputs = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    found: list[Tensor] = []
    with model.frozen(), tqdm(total=len(left), unit="picture", disable=not progress) as bar:
        while left:
            drawn = budget.run(partial(_draw, model.pipe, left, negative_prompt, inputs))
            found += drawn
            left = left[len(drawn) :]
            bar.update(len(drawn))
    return torch.stack(found).unflatten(0, (len(texts), num_images))


def _draw(
    pipe: Any,
    left: Sequence[tuple[str, int]],
    negative_prompt: str | None,
    inputs: dict[str, Any],
    count: int,
) -> Tensor:
    """The first `count` pictures of what is left, (count, 3, H, W)."""
    prompts, seeds = zip(*left[:count], strict=True)
    negative = [negative_prompt] * len(prompts) if negative_prompt else None  # "" is no prompt to SDXL
    return draw(pipe, seeds, 1, prompt=list(prompts), negative_prompt=negative, **inputs)[0]
