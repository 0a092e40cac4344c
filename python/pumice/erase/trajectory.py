"""Latents at random times on guided trajectories: where erasure by training spends nearly all of its work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from pumice.models import DiffusionModel, GuidedSampler, PromptEmbeds, RowBudget
from pumice.models.draws import Draws
from pumice.models.graph import Graphed
from pumice.training.processes import processes

Variant = Literal["paper", "code"]


class Latents(NamedTuple):
    """What a step trains on.

    Attributes:
        z: (rows, branches, C, h, w) float32.
        t: (rows,) int64, the timesteps; branches share them.
    """

    z: Tensor
    t: Tensor

    def of(self, rows: Sequence[int], branch: int = 0) -> tuple[Tensor, Tensor]:
        """z (B, C, h, w) of a branch and t (B,), of some rows."""
        return self.z[list(rows), branch], self.t[list(rows)]


def origin(step: int, pending: int, reuse: int) -> int:
    """The step that a step's latents were drawn for."""
    first = step - step % (pending * reuse)
    return first + (step - first) % pending


class Trajectories:
    """z_t for each step of a training: DDIM with guidance from noise to a random time.

    ::

        k ~ U{0, ..., N - 1}      t ~ U{k T / N, ..., (k + 1) T / N - 1}
        z_t = N - 1 - k steps of DDIM from z_T ~ N(0, I), guided by s_g

    With variant "code" as CompVis' sampler runs it in the released code of ESD, EAP and AGE: the highest of
    the N timesteps is left out, and min(N - k, N - 1) steps are made, 25.48 in the mean for N = 50.

    All rows of a block go through the denoiser together, those of both sides of the guidance, of several
    prompts (branches) and of several training steps (`pending`); one that has reached its time leaves.

    Args:
        model: that draws; its weights may change between blocks.
        prompts: from a step to the prompts that its rows draw, (rows x branches) of them, row by row;
            branches of a row share time and noise.
        draws: of the rows, on the CPU, where times and lengths are read.
        count: rows of a step.
        steps: of the training.
        branches: prompts a row.
        num_inference_steps: N.
        guidance_scale: s_g.
        variant: as above.
        pending: how many training steps' latents are drawn at once, by the weights of the first. 1 is exact.
        reuse: how many times each block is used, at other t of the same part of the schedule. 1 is exact.
        dtype: of the passes of the sampler; if it is not the network's own, a copy of the denoiser in that
            dtype draws, and takes over at each block the weights that train.
        rows: of a pass; halved on out-of-memory.

    Attributes:
        state: the block at hand and the count of passes, changed in place.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Callable[[int], PromptEmbeds],
        draws: Draws,
        count: int,
        steps: int,
        *,
        branches: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        variant: Variant = "paper",
        pending: int = 1,
        reuse: int = 1,
        dtype: torch.dtype | None = None,
        rows: int = 64,
    ) -> None:
        self._model, self._prompts, self._draws = model, prompts, draws
        self._count, self._branches, self._total = count, branches, steps
        self._steps, self._variant = num_inference_steps, variant
        self._pending, self._reuse = pending, reuse
        self._sampler = GuidedSampler(model, num_inference_steps, guidance_scale)
        self._budget = RowBudget(rows)
        self._narrow = None if dtype in (None, model.dtype) else _narrowed(model, dtype)
        self._graph = Graphed(self._predict)
        shape = (pending, count, branches, *model.latent_shape())
        self.state = {
            "first": torch.tensor(-1),
            "latents": torch.zeros(shape, device=model.device),
            "passes": torch.tensor(0),
        }
        with torch.no_grad():
            self._away = model.unconditional()

    @property
    def passes(self) -> int:
        """Samples that went through the denoiser so far."""
        return int(self.state["passes"])

    def at(self, step: int) -> Latents:
        """Those of a step; the block that it is in is drawn when it is first met."""
        drawn = origin(step, self._pending, self._reuse)
        place = drawn % self._pending
        first = drawn - place
        if int(self.state["first"]) != first:
            found = self._drawn(range(first, min(first + self._pending, self._total)))
            self.state["latents"][: len(found)].copy_(found)
            self.state["first"].fill_(first)
        return Latents(self.state["latents"][place], self._timesteps(step, drawn))

    def skipped(self, k: Tensor) -> Tensor:
        """How many steps of DDIM lead to part k of the schedule."""
        if self._variant == "code":
            return (self._steps - k).clamp(max=self._steps - 1)
        return self._steps - 1 - k

    def _parts(self, step: int) -> Tensor:
        """k of each row."""
        return self._draws.integers(range(self._count), "part", step, self._steps)

    def _timesteps(self, step: int, drawn: int) -> Tensor:
        """t of each row: uniform in the part of the schedule that its latent was drawn for."""
        total = self._model.schedule.num_train_timesteps
        k, device = self._parts(drawn), self._model.device
        low, high = k * total // self._steps, (k + 1) * total // self._steps
        u = self._draws.uniform(range(self._count), "t", step)
        return (low + (u * (high - low)).long()).to(device)

    @torch.no_grad()
    def _drawn(self, steps: range) -> Tensor:
        """(steps, rows, branches, C, h, w): every process draws its share, and all have all."""
        shape = self._model.latent_shape()
        rows, branches = range(self._count), self._branches
        noise = torch.cat([self._draws.normal(rows, "start", step, shape) for step in steps])
        noise = noise.to(self._model.device).repeat_interleave(branches, 0)
        counts = torch.cat([self.skipped(self._parts(step)) for step in steps]).repeat_interleave(branches)
        embeds = PromptEmbeds.cat([self._prompts(step) for step in steps])
        self._refresh()
        state = processes(self._model.device)
        share = list(range(len(noise)))[state.process_index :: state.num_processes]
        found = torch.zeros_like(noise)
        if share:
            found[share] = self._walk(noise[share], counts[share], embeds[share])
        if state.num_processes > 1:
            found = reduce(found, "sum")
        return found.unflatten(0, (len(steps), self._count, branches))

    def _walk(self, z: Tensor, counts: Tensor, embeds: PromptEmbeds) -> Tensor:
        """z (B, C, h, w) after so many steps each; those with the most go first."""
        z, done = z.clone(), 0
        order = counts.argsort(descending=True, stable=True).tolist()
        while done < len(order):
            done += self._budget.run(partial(self._some, z, counts, embeds, order[done:]))
        return z

    def _some(self, z: Tensor, counts: Tensor, embeds: PromptEmbeds, order: list[int], most: int) -> int:
        """Walk the first of these rows, both sides of the guidance in one pass; how many were walked."""
        part = order[: max(1, most // 2)]
        x, text, left = z[part], embeds[part], counts[part]
        first, size = int(self._variant == "code"), 0
        for step in range(int(left[0])):
            live = int((left > step).sum())
            if size != (size := self._size(live, len(part))):
                both = PromptEmbeds.cat((self._away.repeat(size), text[:size]))
            t = self._sampler.t[first + step]
            output = self._graph(x[:size].repeat(2, 1, 1, 1), t, both.embeds, both.pooled)
            uncond, cond = output.chunk(2)
            self.state["passes"] += 2 * size
            x[:live] = self._sampler.step(first + step, x[:live], cond[:live], uncond[:live]).sample
        z[part] = x
        return len(part)

    def _size(self, live: int, most: int) -> int:
        """Rows of a pass: on a GPU one of few sizes, each of which is a graph."""
        return live if self._model.device.type == "cpu" else min(most, 1 << (live - 1).bit_length())

    def _predict(self, x: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor | None) -> Tensor:
        text = PromptEmbeds(embeds, pooled, self._away.tokens * len(embeds))
        return (self._narrow or self._model).predict(x, t, text).float()

    def _refresh(self) -> None:
        """Bring the weights that train to the copy that draws."""
        if self._narrow is not None:
            pairs = zip(self._narrow.unet.parameters(), self._model.eager_unet.parameters(), strict=True)
            for narrow, weight in pairs:
                if weight.requires_grad:
                    narrow.copy_(weight)


def _narrowed(model: DiffusionModel, dtype: torch.dtype) -> DiffusionModel:
    """The model with a frozen copy of its denoiser in another dtype."""
    found = copy.copy(model)
    found.pipe = copy.copy(model.pipe)
    unet = copy.deepcopy(model.eager_unet).requires_grad_(False).eval()
    found.pipe.unet = nn.Module.to(unet, dtype)  # that of diffusers warns of every cast
    return found
