"""Which prompts replay training pictures: the text-conditional magnitude (Wen et al., ICLR 2024)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice.memorization import engine
from pumice.models import PromptEmbeds

_PROMPTS_A_BLOCK = 64  # encoded together, and in memory together


@dataclass(frozen=True, eq=False)
class Detection:
    """Scores of P prompts from S seeds and T steps; the higher, the more likely memorized.

    Attributes:
        prompts: as they were given.
        scores: (P,) float32, the mean magnitude over seeds and steps.
        magnitudes: (P, S, T) float32, |epsilon_cond - epsilon_uncond| of each prompt, seed and step.
        seeds: of the S initial noises.
        timesteps: of the T steps.
        truncated: the end of each prompt that did not fit the text encoder, "" where all did.
    """

    prompts: tuple[str, ...]
    scores: Tensor
    magnitudes: Tensor
    seeds: tuple[int, ...]
    timesteps: tuple[int, ...]
    truncated: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "prompts": list(self.prompts),
            "scores": self.scores.tolist(),
            "magnitudes": self.magnitudes.tolist(),
            "seeds": list(self.seeds),
            "timesteps": list(self.timesteps),
            "truncated": list(self.truncated),
        }


@torch.inference_mode()
def detect(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    seeds: int | Sequence[int] = 4,
    steps: int | None = 1,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> Detection:
    """Score prompts by how strongly they pull the very first denoising steps: memorized ones pull hard.

    ::

        m[p, s, t] = |epsilon(x_t, t, prompt p) - epsilon(x_t, t, "")|_2    over (C, h, w), x_T the noise of s
        score[p]   = mean of m[p, s, t] over seeds s and steps t

    (Wen et al., arXiv:2407.21720.) Norms are per sample, in float32, and in epsilon whatever the model
    predicts. At the first step x_T does not depend on the prompt, so the unconditional prediction is computed
    once a seed; later steps follow DDIM with guidance. Prompts that tokenize alike are scored once.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel.
        prompts: one or more.
        seeds: how many (0, 1, 2, ...), or which; the same ones for every prompt. Default 4, the paper's.
        steps: how many of the sampler's first steps to score; None for all. Default 1: the paper's fastest
            setting; its best takes all steps.
        num_inference_steps: of the DDIM sampler. Default 50, the paper's.
        guidance_scale: of the sampler, from the second step on. Default 7.5, the paper's.
        height, width: of the pictures, in px; default the model's own.
        batch_size: rows in one call of the denoiser (two calls at a later step); halved on out-of-memory.
        progress: show a bar.

    Returns:
        A `Detection`.

    Differences from the released code: the noise depends on the seed alone, not on the prompt's place in the
    list, so scores do not depend on the order; norms are in float32, not in the model's dtype; v-predictions
    are converted to epsilon.

    Raises:
        TypeError: if a prompt is not a string, or seeds or steps are not integers.
        ValueError: if there are no prompts or no seeds, for numbers out of range, and for a model whose first
            step is pure noise (zero terminal SNR), where epsilon says nothing of the prompt, or whose
            predictions are not finite.
        UnsupportedModelError: if the model's family is not supported.
    """
    prompts = _checked_prompts(prompts)
    seeds = _checked_seeds(seeds)
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: got {guidance_scale}, expected a finite number")
    if operator.index(batch_size) < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    model = models.load(pipe)
    timesteps = model.schedule.timesteps(num_inference_steps)
    steps = len(timesteps) if steps is None else operator.index(steps)
    if not 1 <= steps <= len(timesteps):
        raise ValueError(f"steps: got {steps}, expected 1 to num_inference_steps = {len(timesteps)}, or None")
    if model.schedule.epsilon_scale(timesteps[:1]).item() == 0:
        raise ValueError(
            "pipe: its first step is pure noise (zero terminal SNR), where epsilon says nothing of the prompt"
        )
    noise = engine.initial_noise(seeds, model.latent_shape(height, width))

    different = list(dict.fromkeys(prompts))
    place: dict[tuple[int, ...], int] = {}  # token ids -> row of `magnitudes`
    row_of: dict[str, int] = {}
    truncated: dict[str, str] = {}
    blocks = []
    bar = tqdm(total=len(different) * len(seeds), unit="row", disable=not progress, desc="detect")
    with model.frozen(), bar:
        magnitude = engine.ConditionalMagnitude(
            model,
            noise,
            steps=steps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
        )
        for first in range(0, len(different), _PROMPTS_A_BLOCK):
            block = different[first : first + _PROMPTS_A_BLOCK]
            embeds = model.encode_prompt(block)
            new = _first_occurrences(embeds, place)
            for prompt, tokens in zip(block, embeds.tokens, strict=True):
                row_of[prompt], truncated[prompt] = place[tokens.ids], tokens.truncated
            bar.update((len(embeds) - len(new)) * len(seeds))
            if new:
                blocks.append(magnitude(embeds[new], bar.update))
    magnitudes = torch.cat(blocks)[[row_of[prompt] for prompt in prompts]]
    if not bool(magnitudes.isfinite().all()):
        count = int((~magnitudes.isfinite()).any(dim=2).any(dim=1).sum())
        raise ValueError(
            f"pipe: its predictions for {count} of {len(prompts)} prompts are not finite in {model.dtype}"
        )
    return Detection(
        prompts=prompts,
        scores=magnitudes.double().mean((1, 2)).float(),
        magnitudes=magnitudes,
        seeds=seeds,
        timesteps=tuple(magnitude.timesteps.tolist()),
        truncated=tuple(truncated[prompt] for prompt in prompts),
    )


def _first_occurrences(embeds: PromptEmbeds, place: dict[tuple[int, ...], int]) -> list[int]:
    """Which of the prompts have token ids that `place` does not know yet; they get the next places."""
    new = []
    for index, tokens in enumerate(embeds.tokens):
        if tokens.ids not in place:
            place[tokens.ids] = len(place)
            new.append(index)
    return new


def _checked_prompts(prompts: str | Sequence[str]) -> tuple[str, ...]:
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts:
        raise ValueError("prompts: got an empty list, expected at least one prompt")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompts: got a {type(prompt).__name__}, expected strings")
    return prompts


def _checked_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, Sequence) and not isinstance(seeds, str):
        found = tuple(operator.index(seed) for seed in seeds)
    else:
        found = tuple(range(operator.index(seeds)))
    if not found or min(found) < 0:
        raise ValueError(
            f"seeds: got {seeds}, expected a positive number of seeds, or seeds that are not negative"
        )
    return found
