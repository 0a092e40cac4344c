"""What a model learns from pictures: copies of it are personalized on them, and draw."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pumice import models
from pumice.evaluate.preprocess import check_images
from pumice.memorization.arguments import check_finite, checked_seeds
from pumice.models import DiffusionModel, PromptEmbeds, RowBudget
from pumice.models.drawing import draw


class Learning(TypedDict, total=False):
    """How pictures are learned and drawn: the arguments of `learnability`."""

    steps: int
    learning_rate: float
    batch_size: int
    seeds: int | Sequence[int]
    drawings: int
    num_inference_steps: int
    guidance_scale: float
    rows: int
    progress: bool


@dataclass(frozen=True, eq=False)
class Learned:
    """What copies of a model drew that were personalized on the same pictures, one from each of R seeds.

    Attributes:
        pictures: (R, P, D, 3, H, W) uint8 on the CPU: D for each of P prompts.
        losses: (R, steps) float32, of each step before its update. Every step draws its own noise and
            timesteps, so neighbours differ by more than the progress.
        settings: of the run.
    """

    pictures: Tensor
    losses: Tensor
    settings: dict[str, Any]


@torch.inference_mode(False)  # a caller's inference mode would leave nothing to differentiate
@torch.enable_grad()
def learnability(
    pipe: Any,
    pictures: Tensor,
    prompt: str,
    prompts: Sequence[str] = (),
    *,
    steps: int = 1000,
    learning_rate: float = 5e-7,
    batch_size: int = 1,
    seeds: int | Sequence[int] = (0,),
    drawings: int = 8,
    num_inference_steps: int = 100,
    guidance_scale: float = 7.5,
    rows: int = 32,
    progress: bool = False,
) -> Learned:
    """Personalize copies of a model on pictures, as who protects them fears, and draw with what it learned.

    ::

        loss = mean over n of |network(z_t, t_n, c) - target(z_n, noise_n, t_n)|^2 / (C h w)

    by AdamW on all weights of the denoiser (DreamBooth, Ruiz et al., arXiv:2208.12242); z_n is the latent of
    one of the pictures. The copy trains in float32 and draws in the pipeline's dtype with its scheduler.

    Everything random comes from the seeds: two sets of as many pictures meet the same order, timesteps and
    noises, and drawing d of a copy starts from `torch.Generator().manual_seed(seed * drawings + d)` for every
    prompt. So what is drawn can be compared picture by picture.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        pictures: (N, 3, H, W) floating, in [0, 1], of the size that the model draws.
        prompt: c, what the pictures are called in training, such as "a photo of sks person".
        prompts: to draw; default the same.
        steps: default 1000, as Anti-DreamBooth trains (Van Le et al., arXiv:2303.15433); 0 draws with the
            model as it is.
        learning_rate: default 5e-7, of the same; for networks of 860 million weights.
        batch_size: default 1, of the same.
        seeds: how many copies (0, 1, 2, ...), or which.
        drawings: for each prompt.
        num_inference_steps: default 100, of the same.
        guidance_scale: default 7.5, of the same.
        rows: pictures drawn in one call; halved on out-of-memory.
        progress: show a bar.

    Returns:
        A `Learned`.

    Differences from Anti-DreamBooth's training: the text encoder is frozen, there are no pictures of the
    class (prior preservation), and latents are the means of the encoder's posterior.

    Raises:
        TypeError: if pictures are no floating tensor, or a prompt no string.
        ValueError: for other shapes or values, numbers out of range, and if it drew what is not finite.
        UnsupportedModelError: if the model's family is not supported.
    """
    check_images("pictures", pictures)
    counts = {"steps": steps, "batch_size": batch_size, "drawings": drawings}
    for name, number in {**counts, "num_inference_steps": num_inference_steps}.items():
        least = 0 if name == "steps" else 1
        if operator.index(number) < least:
            raise ValueError(f"{name}: got {number}, expected at least {least}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate: got {learning_rate}, expected a positive number")
    check_finite("guidance_scale", guidance_scale)
    texts, seeds = _checked_prompts(prompt, prompts), checked_seeds(seeds)
    most = RowBudget(rows).rows
    model = models.load(pipe)
    model.check_text_to_image()
    inputs = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": pictures.shape[2],
        "width": pictures.shape[3],
    }
    found, losses = [], []
    with model.frozen(), tqdm(total=len(seeds) * steps, unit="step", disable=not progress) as bar:
        with torch.no_grad():
            embeds = model.encode_prompt(prompt)
            latents = torch.cat([model.encode_image(part) for part in pictures.split(most)])
        for seed in seeds:
            student, loss = _personalized(
                model,
                latents,
                embeds,
                steps=steps,
                learning_rate=learning_rate,
                batch_size=batch_size,
                seed=seed,
                bar=bar,
            )
            found.append(_drawn(student, texts, range(seed * drawings, (seed + 1) * drawings), most, inputs))
            losses.append(loss)
    settings = {
        "model": repr(model),
        "scheduler": type(model.pipe.scheduler).__name__,
        "pictures": len(pictures),
        "prompt": prompt,
        "prompts": list(texts),
        **counts,
        "learning_rate": learning_rate,
        "seeds": list(seeds),
        **inputs,
    }
    return Learned(torch.stack(found), torch.stack(losses), settings)


def _personalized(
    model: DiffusionModel,
    latents: Tensor,
    embeds: PromptEmbeds,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    bar: tqdm[Any],
) -> tuple[Any, Tensor]:
    """A pipeline whose denoiser is a trained copy, and the losses (steps,)."""
    pipe = copy(model.pipe)  # of its own are only the parts that are put into it
    pipe.scheduler = deepcopy(pipe.scheduler)
    pipe.unet = unet = deepcopy(model.eager_unet).requires_grad_(True)
    nn.Module.to(unet, torch.float32)  # that of diffusers warns of every cast
    student, schedule, generator = models.load(pipe), model.schedule, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, fused=True)
    losses = []
    for _ in range(steps):
        which = torch.randint(len(latents), (batch_size,), generator=generator)
        t = torch.randint(schedule.num_train_timesteps, (batch_size,), generator=generator)
        noise = torch.randn((batch_size, *latents.shape[1:]), generator=generator)
        z, t, noise = latents[which.to(latents.device)], t.to(latents.device), noise.to(latents.device)
        output = student.predict(schedule.add_noise(z, noise, t), t, embeds)
        loss = (output - schedule.target(z, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        bar.update()
    nn.Module.to(unet, model.dtype).requires_grad_(False)
    return pipe, torch.stack(losses).cpu() if losses else torch.empty(0)


def _drawn(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], most: int, inputs: dict[str, Any]
) -> Tensor:
    """(P, D, 3, H, W) uint8."""
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    budget, found = RowBudget(most), list[Tensor]()
    while (done := sum(map(len, found))) < len(wanted):
        found.append(budget.run(partial(_draw, pipe, wanted[done:], inputs)))
    return torch.cat(found).unflatten(0, (len(prompts), len(seeds)))


def _draw(pipe: Any, left: Sequence[tuple[str, int]], inputs: dict[str, Any], count: int) -> Tensor:
    """Pictures of the first `count` of what is left."""
    prompts, seeds = zip(*left[:count], strict=True)
    return draw(pipe, seeds, 1, prompt=list(prompts), **inputs)[0]


def _checked_prompts(prompt: str, prompts: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: got a {type(prompt).__name__}, expected a string")
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"prompts: got {prompts!r}, expected a list of strings")
    return tuple(prompts) or (prompt,)
