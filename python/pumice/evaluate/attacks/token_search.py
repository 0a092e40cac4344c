"""A search for tokens that bring a concept back, over prompts and edits together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice.evaluate.attacks.attack import Attack, Judge, rate
from pumice.evaluate.attacks.free_tokens import FreeTokens, Vocabulary
from pumice.evaluate.drawing import edited, groups
from pumice.models import DiffusionModel, Edit, RowBudget, fingerprint
from pumice.training.student import FLOAT16_SCALE


class Tokens(Protocol):
    """The tokens of some runs, and what they are found by."""

    def read(self, step: int) -> Tensor:
        """What each run's prompt holds in this step, (runs, k) int64."""

    def update(self, gradient: Tensor) -> None:
        """Go down the gradient (runs, k, sum of d) of what was read."""

    def found(self) -> Tensor:
        """The tokens as they stand, (runs, k) int64."""


class Lesson(NamedTuple):
    """What a step compares with: the edited model's epsilon of latents at timesteps should be this one.

    Attributes:
        latents, t, goal: (prompts, C, h, w), (prompts,), (prompts, C, h, w).
    """

    latents: Tensor
    t: Tensor
    goal: Tensor


@dataclass(frozen=True)
class Search:
    """A search for each prompt and edit until a picture shows the concept.

    ::

        loss = mean |epsilon'(latents, t, prompt with the tokens) - goal|^2

    Runs share batches, and those that have succeeded leave them: what is found for one prompt and edit does
    not depend on the others in the call.

    Attributes:
        model, judge: that are attacked, and that draws and tells.
        prompts: as they are without free tokens.
        free: the prompts with them.
        vocabulary: of the tokens.
        lesson: from a step and some prompts to what they learn, by the model without an edit.
        start: from the prompts of runs to their tokens.
        steps: of each run, at most.
        draw_every: steps after which it is seen whether a run has succeeded.
        seed: of the picture of the first prompt; one more for each.
    """

    model: DiffusionModel
    judge: Judge
    prompts: tuple[str, ...]
    free: FreeTokens
    vocabulary: Vocabulary
    lesson: Callable[[int, Sequence[int]], Lesson]
    start: Callable[[Sequence[int]], Tokens]
    steps: int
    draw_every: int
    seed: int

    def run(self, edits: Mapping[str, Edit | None], rows: int, *, progress: bool, **about: Any) -> Attack:
        """Search under each edit, `rows` runs at a time; halved on out-of-memory. about: of the `Attack`."""
        runs: dict[tuple[str, int], _Run] = {}
        budget, base = RowBudget(rows), fingerprint(self.model)
        bar = tqdm(
            total=len(edits) * len(self.prompts), unit="run", desc=about["attack"], disable=not progress
        )
        with self.model.frozen(), bar:
            for group in groups(edits, rows):
                left = [(name, prompt) for prompt in range(len(self.prompts)) for name in group]
                while left:
                    found = budget.run(partial(self._some, left, group, base))
                    runs |= dict(zip(left, found, strict=False))
                    left = left[len(found) :]
                    bar.update(len(found))
        of = {name: [runs[name, prompt] for prompt in range(len(self.prompts))] for name in edits}
        budgets = sorted({0, *range(self.draw_every, self.steps, self.draw_every), self.steps})
        return Attack(
            rows=tuple(
                {"name": name, "steps": steps} | rate([run.success <= steps for run in found])
                for name, found in of.items()
                for steps in budgets
            ),
            losses={name: torch.stack([run.losses for run in found]).cpu() for name, found in of.items()},
            pictures={name: torch.stack([run.picture for run in found]) for name, found in of.items()},
            prompts={name: tuple(run.prompt for run in found) for name, found in of.items()},
            **about,
        )

    def _some(
        self, left: Sequence[tuple[str, int]], group: Mapping[str, Edit | None], base: str, count: int
    ) -> list[_Run]:
        """The first of the runs that are left, at once and from their start to their end.

        base: the model's fingerprint, computed once.
        """
        of = left[:count]
        device, prompts = self.model.device, [prompt for _, prompt in of]
        tokens = self.start(prompts)
        losses = torch.full((self.steps, len(of)), float("nan"), device=device)
        runs = [_Run(self.prompts[prompt]) for prompt in prompts]

        def see(steps: int, alive: Sequence[int], text: Any, words: Sequence[str]) -> None:
            pictures = self.judge.draw(text, [self.seed + prompts[run] for run in alive])
            for run, word, picture, hit in zip(
                alive, words, pictures, self.judge.hits(pictures), strict=True
            ):
                runs[run].prompt, runs[run].picture = word, picture
                runs[run].success = steps if hit else runs[run].success

        alive = list(range(len(of)))
        with self._edited(of, alive, group, base):
            plain = [self.prompts[prompt] for prompt in prompts]
            see(0, alive, plain, plain)
        for begin in range(0, self.steps, self.draw_every):
            alive = [run for run in alive if runs[run].success > begin]
            if not alive:
                break
            which = [prompts[run] for run in alive]
            some = sorted(set(which))
            end = min(begin + self.draw_every, self.steps)
            lessons = [self.lesson(step, some) for step in range(begin, end)]
            places = torch.tensor(alive, device=device)
            rows = torch.tensor([some.index(prompt) for prompt in which], device=device)
            with self._edited(of, alive, group, base):
                for step, lesson in zip(range(begin, end), lessons, strict=True):
                    read = tokens.read(step)
                    loss, gradient = self._gradient(
                        read[places], which, Lesson(*(part[rows] for part in lesson))
                    )
                    losses[step, places] = loss
                    whole = gradient.new_zeros(*read.shape, gradient.shape[-1])
                    tokens.update(whole.index_copy_(0, places, gradient))
                found = tokens.found()[places]
                words = self.vocabulary.texts(found)
                with torch.no_grad():
                    text = self.free.encode(self._vectors(found), which)
                see(
                    end,
                    alive,
                    text,
                    [self.free.text(prompt, word) for prompt, word in zip(which, words, strict=True)],
                )
        for run, loss in zip(runs, losses.T, strict=True):
            run.losses = loss
        return runs

    def _edited(
        self, of: Sequence[tuple[str, int]], alive: Sequence[int], group: Mapping[str, Edit | None], base: str
    ) -> AbstractContextManager[None]:
        """Each run that goes on under its own edit; one that is no map is alone in its group."""
        edits = [group[of[run][0]] for run in alive]
        return edited(self.model, edits[:1] if len(group) == 1 else edits, base=base)

    def _vectors(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.vocabulary.split(self.vocabulary.table[tokens])

    @torch.enable_grad()
    def _gradient(self, tokens: Tensor, which: Sequence[int], lesson: Lesson) -> tuple[Tensor, Tensor]:
        """The loss of each run, and its gradient in the embeddings of its tokens; zero if not finite."""
        scale = FLOAT16_SCALE if self.model.dtype == torch.float16 else 1.0
        vectors = [vector.requires_grad_() for vector in self._vectors(tokens)]
        text = self.free.encode(vectors, which)
        error = self.model.predict_noise(lesson.latents, lesson.t, text) - lesson.goal
        loss = error.square().flatten(1).mean(1)
        gradient = torch.cat(torch.autograd.grad(loss.sum() * scale, vectors), dim=-1) / scale
        finite = gradient.flatten(1).isfinite().all(1)
        return loss.detach(), torch.where(finite.view(-1, 1, 1), gradient, 0)


class _Run:
    """One prompt under one edit.

    Attributes:
        prompt, picture: the last that was drawn.
        success: steps after which the picture showed the concept; infinite for never.
        losses: (steps,).
    """

    def __init__(self, prompt: str) -> None:
        self.prompt, self.success = prompt, float("inf")
        self.picture, self.losses = torch.empty(0), torch.empty(0)
