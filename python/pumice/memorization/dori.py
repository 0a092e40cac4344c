"""Red team: does a mitigated model still know a picture? (DoRI; Kowalczuk et al., ICML 2026)."""

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
from pumice.memorization.arguments import checked_prompts
from pumice.models import DiffusionModel, PromptEmbeds, RowBudget
from pumice.training.student import FLOAT16_SCALE


@dataclass(frozen=True, eq=False)
class Attack:
    """Prompt embeddings that pull B pictures out of a model, if they are in it.

    Attributes:
        prompt_embeds: of the B pictures, float32; draw with `pipe(prompt_embeds=attack.prompt_embeds.embeds)`
            (and `pooled_prompt_embeds` for SDXL).
        losses: (B, steps) float32, the diffusion loss of each step before its update. Every step draws its
            own noise and timesteps, so neighbours in a row differ by more than the progress.
        skipped: (B,) int64, how many steps had a gradient that was not finite, and changed nothing.
        prompts: that the embeddings started from; None if from Gaussian noise.
        batch_size: noises a step.
        lr: of Adam.
        seed: of noises, timesteps and the Gaussian start.
    """

    prompt_embeds: PromptEmbeds
    losses: Tensor
    skipped: Tensor
    prompts: tuple[str, ...] | None
    batch_size: int
    lr: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON, without the embeddings."""
        return {
            "losses": self.losses.tolist(),
            "skipped": self.skipped.tolist(),
            "prompts": None if self.prompts is None else list(self.prompts),
            "batch_size": self.batch_size,
            "lr": self.lr,
            "seed": self.seed,
        }


@torch.inference_mode(False)  # a caller's inference mode would leave nothing to differentiate
def dori(
    pipe: Any,
    images: Tensor,
    prompts: str | Sequence[str] | None = None,
    *,
    steps: int = 50,
    batch_size: int = 8,
    lr: float = 0.1,
    seed: int = 0,
    rows: int = 32,
    progress: bool = False,
) -> Attack:
    """Optimise a prompt embedding for each picture until the model draws it, within a budget of steps.

    ::

        loss(y) = mean over n of |network(x_t, t_n, y) - target(x0, noise_n, t_n)|^2 / (C h w)
        x_t     = alpha_t x0 + sigma_t noise_n,   t_n uniform over all timesteps
        y       <- Adam step on loss(y), with new noise_n and t_n

    (Kowalczuk et al., arXiv:2507.16880.) A mitigation that hides a memorized picture from its caption, but
    leaves it in the weights, gives it back to these embeddings: call this on the mitigated model, draw with
    the embeddings, and measure. A model takes far more steps to learn an embedding for a picture that it has
    not memorized (the paper: over 500), so the budget is part of the test. Make sure of it with pictures that
    the model was not trained on: where an embedding has more numbers than the latents, as in the testbed, it
    can describe most pictures, and 10 steps tell memorized ones from others better than 50, not fully.

    Noises and timesteps come from the seed and are the same for all pictures: what is found for one does not
    depend on the others in the call. The weights are frozen; the embeddings and Adam's moments are float32
    whatever the networks are.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel: with the mitigation in it.
        images: (B, 3, H, W) floating, in [0, 1], H and W multiples of the autoencoder's scale factor.
        prompts: B, to start from; without them the start is standard Gaussian noise, one for all pictures.
        steps: of Adam. Default 50, the paper's.
        batch_size: noises (and timesteps) a picture and step. Default 8, the paper's.
        lr: Adam's learning rate. Default 0.1, the paper's.
        seed: of noises, timesteps and the Gaussian start.
        rows: in one call of the denoiser, pictures and noises together; halved on out-of-memory.
        progress: show a bar.

    Returns:
        An `Attack`.

    Differences from the paper: a step whose gradient is not finite is skipped, for that picture alone; with
    SDXL the pooled embedding is optimised, too.

    Raises:
        TypeError: if images are not a floating tensor, a prompt is not a string, or a number is not an
            integer where one is expected.
        ValueError: for pictures of another shape or range or none at all, as many prompts as do not fit, for
            numbers out of range, and if no step of some picture had a finite gradient.
        UnsupportedModelError: if the model's family is not supported.
    """
    for name, number in (("steps", steps), ("batch_size", batch_size), ("rows", rows)):
        if operator.index(number) < 1:
            raise ValueError(f"{name}: got {number}, expected at least 1")
    if operator.index(seed) < 0:
        raise ValueError(f"seed: got {seed}, expected one that is not negative")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: got {lr}, expected a positive number")
    model = models.load(pipe)
    with model.frozen():
        x0 = _encode(model, images, rows)
        if prompts is not None:
            prompts = checked_prompts(prompts)
            if len(prompts) != len(x0):
                raise ValueError(f"prompts: got {len(prompts)}, expected {len(x0)}, one for each picture")
        generator = torch.Generator().manual_seed(seed)
        embeds = _start(model, prompts, len(x0), generator)
        gradient = _Gradient(model, x0, embeds, rows)
        adam = _Adam(gradient.parameters, lr)
        losses, skipped = [], torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
        for _ in tqdm(range(steps), unit="step", desc="dori", disable=not progress):
            noise = torch.randn((batch_size, *x0.shape[1:]), generator=generator)
            t = torch.randint(model.schedule.num_train_timesteps, (batch_size,), generator=generator)
            loss, gradients = gradient(noise, t)
            skipped += ~adam.step(gradients)
            losses.append(loss)
    skipped = skipped.cpu()
    hopeless = int((skipped == steps).sum())
    if hopeless:
        raise ValueError(
            f"pipe: for {hopeless} of {len(x0)} pictures no gradient was finite in {model.dtype}"
        )
    return Attack(
        prompt_embeds=embeds,
        losses=torch.stack(losses, dim=1).cpu(),
        skipped=skipped,
        prompts=prompts,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
    )


@torch.no_grad()
def _encode(model: DiffusionModel, images: Tensor, rows: int) -> Tensor:
    """Latents of the pictures, (B, C, h, w) float32."""
    if isinstance(images, Tensor) and images.ndim == 4 and not len(images):
        raise ValueError("images: got none, expected at least one picture")
    parts = images.split(rows) if isinstance(images, Tensor) and images.ndim else (images,)
    return torch.cat([model.encode_image(part) for part in parts])


@torch.no_grad()
def _start(
    model: DiffusionModel, prompts: tuple[str, ...] | None, count: int, generator: torch.Generator
) -> PromptEmbeds:
    """Where the embeddings start, float32: those of the prompts, or Gaussian noise of their shape."""
    encoded = model.encode_prompt(prompts or [""])

    def prepare(value: Tensor) -> Tensor:
        if prompts is None:
            value = torch.randn(value.shape, generator=generator).expand(count, *value.shape[1:])
        return value.to(model.device, torch.float32).clone()  # ours to change

    embeds = prepare(encoded.embeds)
    pooled = None if encoded.pooled is None else prepare(encoded.pooled)
    return PromptEmbeds(embeds, pooled, encoded.tokens if prompts else encoded.tokens * count)


class _Gradient:
    """The diffusion loss of every picture, and its gradient by that picture's embedding."""

    def __init__(self, model: DiffusionModel, x0: Tensor, embeds: PromptEmbeds, rows: int) -> None:
        self.parameters = [embeds.embeds] if embeds.pooled is None else [embeds.embeds, embeds.pooled]
        self._model, self._x0, self._embeds, self._budget = model, x0, embeds, RowBudget(rows)
        self._scale = FLOAT16_SCALE if model.dtype == torch.float16 else 1.0

    def __call__(self, noise: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Losses (B,), and gradients shaped like `parameters`, over N noises and timesteps."""
        noise, t = noise.to(self._x0.device), t.to(self._x0.device)
        return self._budget.run(lambda rows: self._accumulate(noise, t, rows))

    @torch.enable_grad()
    def _accumulate(self, noise: Tensor, t: Tensor, rows: int) -> tuple[Tensor, list[Tensor]]:
        leaves = [parameter.detach().requires_grad_() for parameter in self.parameters]
        embeds = PromptEmbeds(leaves[0], leaves[1] if len(leaves) > 1 else None, self._embeds.tokens)
        count, total = len(noise), len(self._x0) * len(noise)
        errors, gradients = [], [torch.zeros_like(leaf) for leaf in leaves]
        for start in range(0, total, rows):
            row = range(start, min(start + rows, total))
            image, draw = [i // count for i in row], [i % count for i in row]
            found = self._errors(self._x0[image], noise[draw], t[draw], embeds[image])
            parts = torch.autograd.grad(found.sum() * (self._scale / count), leaves)
            for gradient, part in zip(gradients, parts, strict=True):
                gradient += part / self._scale
            errors.append(found.detach())
        return torch.cat(errors).view(-1, count).mean(1), gradients

    def _errors(self, x0: Tensor, noise: Tensor, t: Tensor, embeds: PromptEmbeds) -> Tensor:
        schedule = self._model.schedule
        output = self._model.predict(schedule.add_noise(x0, noise, t), t, embeds).float()
        return (output - schedule.target(x0, noise, t)).square().flatten(1).mean(1)


class _Adam:
    """torch.optim.Adam in place, with moments and a step count for each picture, the first dimension.

    A picture whose gradient is not finite stays as it is, moments and count too; deciding that needs no
    reading from the device.
    """

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        self._parameters, self._lr = parameters, lr
        self._first = [torch.zeros_like(parameter) for parameter in parameters]
        self._second = [torch.zeros_like(parameter) for parameter in parameters]
        self._count = parameters[0].new_zeros(len(parameters[0]), dtype=torch.float64)

    def step(self, gradients: list[Tensor], beta1: float = 0.9, beta2: float = 0.999) -> Tensor:
        """Move the pictures whose gradients are finite, and tell which, (B,) bool."""
        finite = torch.stack([g.flatten(1).isfinite().all(1) for g in gradients]).all(0)
        self._count += finite
        for parameter, first, second, g in zip(
            self._parameters, self._first, self._second, gradients, strict=True
        ):
            count, moves = (x.view(-1, *[1] * (g.ndim - 1)) for x in (self._count, finite))
            first.copy_(torch.where(moves, first.lerp(g, 1 - beta1), first))
            second.copy_(torch.where(moves, second.lerp(g.square(), 1 - beta2), second))
            mean, square = first / (1 - beta1**count), second / (1 - beta2**count)
            parameter -= torch.where(moves, self._lr * mean / (square.sqrt() + 1e-8), 0)
        return finite
