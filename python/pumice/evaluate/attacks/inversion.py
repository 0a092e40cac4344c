"""Is an erased concept still there? A word is learned for it from pictures (Pham et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice.evaluate.attacks.attack import (
    Attack,
    Judge,
    batch_of,
    checked_budgets,
    checked_scale,
    checked_seed,
    checked_seeds,
    encoded,
    named,
    rate,
)
from pumice.evaluate.attacks.free_tokens import FreeTokens
from pumice.evaluate.drawing import edited, groups
from pumice.evaluate.erasure import Classify
from pumice.models import DiffusionModel, Edit, PromptEmbeds, RowBudget, fingerprint
from pumice.models.arguments import checked_count
from pumice.models.free_words import STAND_IN, initial_vectors
from pumice.training.student import FLOAT16_SCALE


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Inversion(Attack):
    """An `Attack` by R restarts on each edited model.

    Attributes:
        rows: have the restart, too.
        vectors: by name the learned embeddings, one (R, tokens, d) float32 a text encoder.
        losses: (R, steps), the diffusion loss. Every step draws its own noise and timesteps, so neighbours
            differ by more than the progress.
        pictures: (R, S, 3, H, W), drawn with the word as it is at the end.
    """

    attack: str = "concept_inversion"
    vectors: dict[str, tuple[Tensor, ...]]


@torch.inference_mode(False)  # a caller's inference mode would leave nothing to differentiate
def concept_inversion(
    pipe: Any,
    edits: Edit | Mapping[str, Edit],
    images: Any,
    *,
    label: str,
    classify: Classify,
    k: int = 1,
    steps: int = 1000,
    checkpoints: Sequence[int] = (),
    learning_rate: float = 5e-3,
    batch_size: int = 4,
    template: str = "a photo of a {}",
    tokens: int = 1,
    initial: str = "object",
    restarts: int = 1,
    seeds: int | Sequence[int] = 10,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    rows: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Inversion:
    """Learn a word for an erased concept on the edited model, and count how often it brings the concept back.

    ::

        loss(v) = mean over n of |network(x_t, t_n, text(v)) - target(x0_n, noise_n, t_n)|^2 / (C h w)
        x_t     = alpha_t x0_n + sigma_t noise_n,   x0_n one of the pictures, t_n uniform over all timesteps
        v       <- AdamW step on loss(v), with new x0_n, noise_n and t_n

    (Pham et al., arXiv:2308.01508: textual inversion, arXiv:2208.01618, on a model from which the concept was
    erased.) v stands for the placeholder's tokens in the template, at the input of the text encoder; all
    weights are frozen. An edit that only leads the concept's name elsewhere leaves the concept to be found
    under another one, so closed-form edits in particular have to face this.

    The same attack is made on the model as it is, "none": its success is the most that can be expected, and
    without it a low one elsewhere says nothing. A word can also be learned for things that no model was ever
    taught; pictures of such a thing tell how much of a success is memory, and how much is what a word can do.

    Edits and restarts are attacked in one batch, each sample under its own map of the text embeddings. The
    draws of restart r come from seed + r alone: all edits meet the same ones, and what is found for one does
    not depend on the others in the call.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        edits: by name ("none" is added), or one, named after its method.
        images: of the concept, (N, 3, H, W) floating, in [0, 1], or PIL images or paths, which are cut to the
            size that the model draws: of one's own, or drawn by the model without an edit. The paper takes
            about six.
        label: of the concept, as `classify` calls it.
        classify: pictures (B, 3, H, W) in [0, 1] to the labels of each, likeliest first; compared in lower
            case.
        k: the label counts as there among the first k. Default 1.
        steps: of AdamW. Default 1000, at the upper end of what the attack is usually given.
        checkpoints: smaller budgets at which success is measured, too; 0 is the word at its start.
        learning_rate: default 5e-3, that of textual inversion.
        batch_size: noises a step. Default 4, that of textual inversion.
        template: with {} where the word stands.
        tokens: how many the word has. Default 1, the paper's.
        initial: what the word starts as: one with as many tokens, or else with their mean in every place. By
            default a neutral one.
        restarts: how many words are learned for each edit.
        seeds: how many pictures are drawn with each word (0, 1, 2, ...), or which.
        num_inference_steps: of the pipeline's own scheduler, to draw. Default 50.
        guidance_scale: to draw. Default 7.5.
        rows: samples in one call of the denoiser, those of all edits together, and at least one of each that
            share the call; halved on out-of-memory.
        seed: of pictures, noises and timesteps; one more for each restart.
        progress: show a bar.

    Returns:
        An `Inversion`.

    Differences from the paper: the template is one; pictures are not flipped; with Stable Diffusion XL the
    word has an embedding in each text encoder; a gradient that is not finite counts as zero.

    Raises:
        TypeError: if edits are no edits, images no pictures, or a text no string.
        ValueError: for pictures of another shape or range, numbers out of range, a template in which {} is no
            word of its own or that does not fit, an edit that was made for a model with other weights, and if
            what `classify` returns does not fit.
        UnsupportedModelError: if the model's family is not supported.
    """
    every = named(edits)
    for name, text in (("label", label), ("template", template), ("initial", initial)):
        if not isinstance(text, str):
            raise TypeError(f"{name}: got a {type(text).__name__}, expected a string")
    steps, batch_size = checked_count("steps", steps), checked_count("batch_size", batch_size)
    tokens, restarts = checked_count("tokens", tokens), checked_count("restarts", restarts)
    most, seed = checked_count("rows", rows), checked_seed(seed)
    learning_rate = checked_scale("learning_rate", learning_rate, positive=True)
    budgets = checked_budgets(checkpoints, steps)
    if template.count("{}") != 1 or STAND_IN in template:
        raise ValueError(f"template: got {template!r}, expected one with one {{}} and no {STAND_IN}")
    model = models.load(pipe)
    model.check_text_to_image()
    pictures = batch_of(images, model)
    height, width = pictures.shape[2:]
    judge = _Successes(
        Judge(model, label, classify, k, num_inference_steps, guidance_scale, height=height, width=width),
        checked_seeds(seeds),
    )
    with model.frozen():
        word = FreeTokens(model, [template], tokens, "template")
        if word.truncated[0]:
            raise ValueError(f"template: {word.truncated[0][-40:]!r} of {template!r} does not fit")
        start = initial_vectors(model, initial, tokens)
        x0, base = encoded(model, pictures, most), fingerprint(model)
        bar = tqdm(total=steps * len(every) * restarts, unit="step", desc="inversion", disable=not progress)
        with bar:
            for group in groups(every, max(1, most // restarts)):
                runs = [(name, restart) for name in group for restart in range(restarts)]
                with edited(model, [group[name] for name, _ in runs], base=base):
                    attack = _Words(
                        model,
                        word,
                        start,
                        x0,
                        edits=len(group),
                        seeds=range(seed, seed + restarts),
                        batch_size=batch_size,
                        learning_rate=learning_rate,
                        rows=most,
                    )
                    for budget in budgets:
                        while attack.steps < budget:
                            attack.step()
                            bar.update(len(runs))
                        judge.see(runs, attack, budget, most)
                judge.keep(runs, attack)
    order = {name: place for place, name in enumerate(every)}
    return Inversion(
        label=label,
        rows=tuple(sorted(judge.rows, key=lambda row: (order[row["name"]], row["restart"], row["steps"]))),
        vectors={name: judge.vectors[name] for name in every},
        losses={name: judge.losses[name] for name in every},
        pictures={name: judge.pictures[name] for name in every},
        settings={
            "model": repr(model),
            "scheduler": type(model.pipe.scheduler).__name__,
            "images": len(pictures),
            "k": judge.judge.k,
            "steps": steps,
            "batch_size": batch_size,
            "tokens": tokens,
            "restarts": restarts,
            "learning_rate": learning_rate,
            "template": template,
            "initial": initial,
            "seeds": list(judge.seeds),
            **judge.judge.settings,
            "seed": seed,
        },
    )


class _Words:
    """Words of several edits and restarts, restart by restart of each edit, and AdamW on them.

    Attributes:
        vectors: (runs, tokens, d) float32, one a text encoder.
        steps: so far.
        losses: (runs,) of each step.
    """

    def __init__(
        self,
        model: DiffusionModel,
        word: FreeTokens,
        start: Sequence[Tensor],
        x0: Tensor,
        *,
        edits: int,
        seeds: Sequence[int],
        batch_size: int,
        learning_rate: float,
        rows: int,
    ) -> None:
        self._model, self._word, self._x0, self._edits = model, word, x0, edits
        self._batch_size, self._runs = batch_size, edits * len(seeds)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._budget = RowBudget(max(1, rows // self._runs))
        self._scale = FLOAT16_SCALE if model.dtype == torch.float16 else 1.0
        self.vectors = [each.repeat(self._runs, 1, 1).requires_grad_() for each in start]
        # elementwise, so that every run is as if it were alone
        self._optimizer = torch.optim.AdamW(self.vectors, lr=learning_rate)
        self.steps = 0
        self.losses: list[Tensor] = []

    def encode(self) -> PromptEmbeds:
        return self._word.encode(self.vectors, [0] * self._runs)

    @torch.enable_grad()
    def step(self) -> None:
        x0, noise, t = self._draws()
        embeds = self.encode()
        outputs = [embeds.embeds] if embeds.pooled is None else [embeds.embeds, embeds.pooled]
        loss, gradients = self._budget.run(lambda rows: self._accumulate(x0, noise, t, embeds, rows))
        found = torch.autograd.grad(outputs, self.vectors, gradients)
        finite = torch.stack([gradient.flatten(1).isfinite().all(1) for gradient in found]).all(0)
        for vector, gradient in zip(self.vectors, found, strict=True):
            vector.grad = torch.where(finite.view(-1, 1, 1), gradient / self._scale, 0)
        self._optimizer.step()
        self.losses.append(loss)
        self.steps += 1

    def _draws(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, noise (batch_size, restarts, C, h, w) and timesteps (batch_size, restarts)."""
        count, shape = self._batch_size, self._x0.shape[1:]
        found = [
            (
                torch.randint(len(self._x0), (count,), generator=generator),
                torch.randn((count, *shape), generator=generator),
                torch.randint(self._model.schedule.num_train_timesteps, (count,), generator=generator),
            )
            for generator in self._generators
        ]
        which, noise, t = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
        device = self._x0.device
        return self._x0[which.to(device)], noise.to(device), t.to(device)

    def _accumulate(
        self, x0: Tensor, noise: Tensor, t: Tensor, embeds: PromptEmbeds, size: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Losses of all runs, and the gradients of their text embeddings, so many noises at a time."""
        schedule, count = self._model.schedule, self._batch_size
        leaves = [
            value.detach().requires_grad_() for value in (embeds.embeds, embeds.pooled) if value is not None
        ]
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
        total = torch.zeros(self._runs, device=x0.device)
        for start in range(0, count, size):
            # all edits meet the same draws: (noises, edits, restarts, ...) in one dimension
            clean, epsilon, when = (
                part[start : start + size].unsqueeze(1).expand(-1, self._edits, *part.shape[1:]).flatten(0, 2)
                for part in (x0, noise, t)
            )
            times = len(when) // self._runs
            repeated = [leaf.repeat(times, *[1] * (leaf.ndim - 1)) for leaf in leaves]
            pooled = repeated[1] if len(repeated) > 1 else None
            text = PromptEmbeds(repeated[0], pooled, embeds.tokens * times)
            output = self._model.predict(schedule.add_noise(clean, epsilon, when), when, text).float()
            error = (output - schedule.target(clean, epsilon, when)).square().flatten(1).mean(1)
            loss = error.view(times, self._runs).sum(0) / count
            for gradient, part in zip(
                gradients, torch.autograd.grad(loss.sum() * self._scale, leaves), strict=True
            ):
                gradient += part
            total += loss.detach()
        return total, gradients


class _Successes:
    """Draws with the words as they are at each budget, and counts."""

    def __init__(self, judge: Judge, seeds: tuple[int, ...]) -> None:
        self.judge, self.seeds = judge, seeds
        self.rows: list[dict[str, Any]] = []
        self.vectors: dict[str, tuple[Tensor, ...]] = {}
        self.losses: dict[str, Tensor] = {}
        self.pictures: dict[str, Tensor] = {}
        self._last = torch.empty(0)

    @torch.no_grad()
    def see(self, runs: Sequence[tuple[str, int]], attack: _Words, steps: int, most: int) -> None:
        embeds, budget, found = attack.encode(), RowBudget(max(1, most // len(runs))), list[Tensor]()
        while (done := sum(part.shape[1] for part in found)) < len(self.seeds):
            found.append(budget.run(partial(self._draw, embeds, self.seeds[done:])))
        self._last = torch.cat(found, dim=1)
        for (name, restart), pictures in zip(runs, self._last, strict=True):
            hits = self.judge.hits(pictures)
            self.rows.append({"name": name, "restart": restart, "steps": steps, **rate(hits)})

    def keep(self, runs: Sequence[tuple[str, int]], attack: _Words) -> None:
        losses = torch.stack(attack.losses, dim=1).cpu()
        for name in dict(runs):
            part = [place for place, (other, _) in enumerate(runs) if other == name]
            self.vectors[name] = tuple(vector.detach()[part].cpu() for vector in attack.vectors)
            self.losses[name] = losses[part]
            self.pictures[name] = self._last[part]

    def _draw(self, embeds: PromptEmbeds, left: Sequence[int], count: int) -> Tensor:
        """Pictures (runs, B, 3, H, W) of the first `count` of the seeds that are left."""
        seeds, runs = left[:count], len(embeds)
        text = PromptEmbeds.cat([embeds] * len(seeds))
        pictures = self.judge.draw(text, [seed for seed in seeds for _ in range(runs)])
        return pictures.unflatten(0, (len(seeds), runs)).transpose(0, 1)
