"""What a model learns from: pictures of a subject, and of its class as the model itself draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice.models import vae
from pumice.models.arguments import checked_prompt, first_seed
from pumice.models.draws import Draws
from pumice.models.model import DiffusionModel
from pumice.models.prompts import PromptEmbeds
from pumice.models.row_budget import RowBudget
from pumice.models.sampler import GuidedSampler
from pumice.training.steps import Loss
from pumice.training.student import Learner

_STEPS, _GUIDANCE_SCALE = 50, 7.5
_ROWS = 8


class Examples:
    """Pictures of any size under one prompt; each is encoded once, when a step first meets it.

    Args:
        model: whose latents.
        pictures: (3, H, W) in [0, 1] each.
        prompt: that they are learned under.
        weight: of their part of the loss.
    """

    def __init__(
        self, model: DiffusionModel, pictures: Sequence[Tensor], prompt: str, *, weight: float = 1.0
    ) -> None:
        self.prompt, self.weight = prompt, weight
        self._model, self._pictures = model, pictures
        self._posteriors: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._pictures)

    @torch.no_grad()
    def latents(self, index: int, draws: Draws, row: int, step: int) -> Tensor:
        """A sample of the posterior of picture `index`, (C, h, w), by what `draws` has for (row, step)."""
        if index not in self._posteriors:
            image = self._pictures[index][None].to(self._model.device)
            with self._model.frozen():
                found = vae.encode(self._model.vae, image, upcast=self._model.upcast_vae)
            self._posteriors[index] = found.mean.float(), found.std.float()
        mean, std = self._posteriors[index]
        noise = draws.normal([row], "posterior", step, mean.shape[1:])
        return vae.normalize(self._model.vae, mean + std * noise)[0]


class Row(NamedTuple):
    """What one row of a step learns.

    Attributes:
        number: of its random numbers.
        latents: z, (C, h, w).
        prompt: c.
        weight: in the loss.
    """

    number: int
    latents: Tensor
    prompt: str
    weight: float


def by_shape(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that can go through the denoiser together."""
    found: dict[torch.Size, list[Row]] = {}
    for row in rows:
        found.setdefault(row.latents.shape, []).append(row)
    return list(found.values())


def denoising_loss(
    model: DiffusionModel, rows: Sequence[Row], embeds: PromptEmbeds, draws: Draws, step: int
) -> Tensor:
    """sum over rows  weight * mean |prediction(z_t, t, c) - target|^2, at each row's own t and noise."""
    of = [row.number for row in rows]
    z = torch.stack([row.latents for row in rows])
    t = draws.integers(of, "timestep", step, model.schedule.num_train_timesteps)
    noise = draws.normal(of, "noise", step, z.shape[1:])
    output = model.predict(model.add_noise(z, noise, t), t, embeds)
    error = (output.to(z.dtype) - model.schedule.target(z, noise, t)).square().flatten(1).mean(1)
    weights = error.new_tensor([row.weight for row in rows])
    return (weights * error).sum()


def denoising(learner: Learner, rows: Callable[[int, Draws], Sequence[Row]], count: int, seed: int) -> Loss:
    """The denoising loss of what each step learns, rows 0, ..., `count` - 1."""
    draws = Draws([f"{seed}/training/{row}" for row in range(count)], learner.model.device)

    def loss(step: int, numbers: Sequence[int]) -> Tensor:
        found = {row.number: row for row in rows(step, draws)}
        groups = by_shape([found[number] for number in numbers])
        parts = [
            denoising_loss(learner.model, group, learner.encode([row.prompt for row in group]), draws, step)
            for group in groups
        ]
        return torch.stack(parts).sum()

    return loss


def draw_class(
    model: DiffusionModel, prompt: str, count: int, seed: int | Sequence[int], progress: bool
) -> list[Tensor]:
    """Pictures 0, 1, ... of a class, as `class_batches`, and a bar if `progress`."""
    pictures: list[Tensor] = []
    with tqdm(total=count, unit="class picture", disable=not progress) as bar:
        for batch in class_batches(model, prompt, range(count), seed):
            pictures += batch
            bar.update(len(batch))
    return pictures


def class_batches(
    model: DiffusionModel, prompt: str, numbers: Sequence[int], seed: int | Sequence[int]
) -> Iterator[Tensor]:
    """Pictures of a class as the model draws them, by 50 steps of DDIM with guidance 7.5.

    Args:
        model: that draws.
        prompt: of the class.
        numbers: which of all that there could be.
        seed: of a list, the first.

    Yields:
        (B, 3, H, W) float32 in [0, 1] on the CPU, as many as are drawn together, in the order of `numbers`.
    """
    sampler = GuidedSampler(model, _STEPS, _GUIDANCE_SCALE)
    cond = checked_prompt(model, prompt, "class_prompt")
    draws = Draws([f"{first_seed(seed)}/class {number}" for number in numbers], model.device)
    budget, done = RowBudget(_ROWS), 0

    def some(rows: int) -> Tensor:
        of = range(done, min(done + rows, len(numbers)))
        x = draws.normal(of, "noise", 0, model.latent_shape())
        embeds = PromptEmbeds.cat([model.unconditional().repeat(len(x)), cond.repeat(len(x))])
        for step, t in enumerate(sampler.t):
            away, toward = model.predict(torch.cat((x, x)), t, embeds).float().chunk(2)
            x = sampler.step(step, x, toward, away).sample
        return model.decode_latents(x)

    while done < len(numbers):
        with model.frozen(), torch.no_grad():
            found = budget.run(some).cpu()
        done += len(found)
        yield found
