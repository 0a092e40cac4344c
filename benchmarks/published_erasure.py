"""The published loops of ESD, EAP and AGE, as their papers' code has them: one picture at a time, two models.

They are what `e2e_erase_training.py` times pumice against, and take pumice's random numbers, so that both
train on the same latents. Written from the descriptions of the algorithms:

- two whole models, every weight of one of which gets a gradient, although some train;
- a guided trajectory is drawn pass by pass, both sides of the guidance in a batch of two;
- concepts and the empty prompt are encoded in every iteration;
- EAP and AGE draw both trajectories one after the other, and in iterations of the search also compute what
  only the other iterations use.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pumice.erase.concept_search import gumbel_softmax
from pumice.models import DiffusionModel, GuidedSampler, PromptEmbeds
from pumice.models.draws import Draws

STEPS, GUIDANCE = 50, 3.0


class Published:
    """Two models, and the sampler of one of them.

    Attributes:
        frozen, trained: the two.
        optimizer: Adam's, of cross-attention.
    """

    def __init__(self, model: DiffusionModel, learning_rate: float, seed: int = 0) -> None:
        self.frozen, self.trained = model, _second(model)
        self.frozen.unet.requires_grad_(False)
        self.trained.unet.requires_grad_(True)
        own = [weight for name, weight in self.trained.unet.named_parameters() if ".attn2." in name]
        self.optimizer = torch.optim.Adam(own, learning_rate)
        self.draws = Draws([f"{seed}/erase/0"], model.device)
        self.sampler = GuidedSampler(model, STEPS, GUIDANCE)

    @torch.no_grad()
    def encode(self, text: str) -> PromptEmbeds:
        return self.frozen.encode_prompt(text)

    def part(self, step: int) -> int:
        return int(self.draws.integers([0], "part", step, STEPS))

    def timestep(self, step: int) -> Tensor:
        total, k = self.frozen.schedule.num_train_timesteps, self.part(step)
        low, high = k * total // STEPS, (k + 1) * total // STEPS
        return (low + (self.draws.uniform([0], "t", step).cpu() * (high - low)).long()).to(self.frozen.device)

    @torch.no_grad()
    def sample(self, embeds: PromptEmbeds, step: int) -> Tensor:
        """A latent of the model that trains, at the part of the schedule of this step."""
        x = self.draws.normal([0], "start", step, self.frozen.latent_shape())
        both = PromptEmbeds.cat((self.encode(""), embeds))
        for index in range(min(STEPS - self.part(step), STEPS - 1)):
            output = self.trained.predict(torch.cat((x, x)), self.sampler.t[1 + index], both).float()
            uncond, cond = output.chunk(2)
            x = self.sampler.step(1 + index, x, cond, uncond).sample
        return x

    def x0(self, model: DiffusionModel, z: Tensor, t: Tensor, text: PromptEmbeds) -> Tensor:
        return model.schedule.to_x0(model.predict(z, t, text), z, t)

    def update(self, loss: Tensor) -> float:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def esd(model: DiffusionModel, concept: str, steps: int, learning_rate: float) -> tuple[list[float], Any]:
    """Losses, and the denoiser that trained."""
    own = Published(model, learning_rate)
    losses = []
    for step in range(steps):
        text, nothing = own.encode(concept), own.encode("")
        z, t = own.sample(text, step), own.timestep(step)
        with torch.no_grad():
            away = own.frozen.predict_noise(z, t, nothing)
            towards = own.frozen.predict_noise(z, t, text)
        found = own.trained.predict_noise(z, t, text)
        goal = away - (towards - away)
        losses.append(own.update((found - goal).square().mean()))
    return losses, own.trained.unet


def eap(
    model: DiffusionModel, concept: str, candidates: Sequence[str], steps: int, learning_rate: float
) -> tuple[list[float], Any]:
    """Losses of the weights' steps, each of which is followed by one of the search."""
    return _searched(model, concept, candidates, steps, learning_rate, mixed=False)


def age(
    model: DiffusionModel, concept: str, candidates: Sequence[str], steps: int, learning_rate: float
) -> tuple[list[float], Any]:
    """The same, of AGE with the mixtures that it has for artists."""
    return _searched(model, concept, candidates, steps, learning_rate, mixed=True)


def _searched(
    model: DiffusionModel, concept: str, candidates: Sequence[str], steps: int, rate: float, *, mixed: bool
) -> tuple[list[float], Any]:
    own = Published(model, rate)
    others = model.encode_prompt(list(candidates)).embeds.detach()
    logits = torch.full((len(others),), 1 / len(others), device=model.device, requires_grad=True)
    search = torch.optim.Adam([logits], 1e-2)
    losses = []
    for iteration in range(2 * steps):
        step, searching = divmod(iteration, 2)
        text, nothing = own.encode(concept), own.encode("")
        uniform = own.draws.uniform(
            [0], "gumbel search" if searching else "gumbel training", step, logits.shape
        )
        weights = gumbel_softmax(logits, uniform[0], 2.0, hard=not mixed, top_k=5)
        weights = weights if searching else weights.detach()
        kept = PromptEmbeds(torch.tensordot(weights, others, 1)[None], None, text.tokens)
        still = PromptEmbeds(kept.embeds.detach(), None, text.tokens)
        z_e, z_r, t = own.sample(text, step), own.sample(still, step), own.timestep(step)
        with torch.no_grad():
            away = own.x0(own.frozen, z_e, t, still if mixed else nothing)
            towards = own.x0(own.frozen, z_e, t, text)
            before = own.x0(own.frozen, z_r, t, still)
        found, after = own.x0(own.trained, z_e, t, text), own.x0(own.trained, z_r, t, kept)
        if searching:
            loss = (after - before).square().mean()
            if mixed:
                loss = loss + (found - away).square().mean()
            (-loss).backward()
            search.step()
            search.zero_grad()
            own.trained.unet.zero_grad()
        else:
            erased = (found - (away - (towards - away))).square().mean()
            losses.append(own.update(erased + (after - before).square().mean()))
    return losses, own.trained.unet


def _second(model: DiffusionModel) -> DiffusionModel:
    found = copy.copy(model)
    found.pipe = copy.copy(model.pipe)
    found.pipe.unet = copy.deepcopy(model.unet)
    return found
