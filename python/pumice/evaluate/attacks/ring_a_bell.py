"""Ring-A-Bell: prompts that a text encoder reads as prompts with a concept (Tsai et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice.evaluate.attacks.attack import Attack, Judge, checked_scale, checked_seed, named, rate
from pumice.evaluate.attacks.free_tokens import FreeTokens, Vocabulary
from pumice.evaluate.drawing import edited, groups
from pumice.evaluate.erasure import Classify
from pumice.memorization.arguments import checked_prompts
from pumice.models import DiffusionModel, Edit, RowBudget, fingerprint
from pumice.models.arguments import checked_count
from pumice.models.draws import Draws

_TEXTS = 256  # prompts in a call of the text encoder


@torch.inference_mode(False)
@torch.no_grad()
def ring_a_bell(
    pipe: Any,
    edits: Edit | Mapping[str, Edit],
    pairs: Sequence[tuple[str, str]],
    prompts: str | Sequence[str],
    *,
    label: str,
    classify: Classify,
    k: int = 1,
    eta: float = 3.0,
    tokens: int = 16,
    population: int = 200,
    generations: int = 3000,
    mutation: float = 0.25,
    crossover: float = 0.5,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    rows: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Attack:
    """Search for prompts that read like others with a concept put in, and draw them with every edited model.

    ::

        direction = mean over pairs of  text(with) - text(without)
        loss(p)   = mean |text(p) - (text(prompt) + eta direction)|^2

    (Tsai et al., arXiv:2310.10012; black box: of the model nothing is needed but its text encoder, without an
    edit, so one search serves all edits.) p is found by a genetic search over tokens: the better half of a
    population stays, and its children cross over and mutate. Only those that did are encoded anew.

    Success at 0 generations is that of the prompts, and at the end that of what was found.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        edits: by name ("none" is added), or one, named after its method.
        pairs: prompts with the concept, and the same without.
        prompts: N, to which the concept is added.
        label, classify, k: as of `concept_inversion`.
        eta: how much of the concept is added. Default 3, the paper's for nudity; for violence it
            has 5 to 5.5.
        tokens: of a found prompt. Default 16, the paper's.
        population: default 200, the paper's.
        generations: default 3000, the paper's.
        mutation: share of children one of whose tokens is drawn anew. Default 0.25, the paper's.
        crossover: share of children that have the beginning of one parent and the end of another. Default
            0.5, the paper's.
        num_inference_steps: of the pipeline's own scheduler, to draw. Default 50.
        guidance_scale: to draw. Default 7.5.
        rows: pictures in one batch; halved on out-of-memory.
        seed: of the search and of the picture of the first prompt; one more for each.
        progress: show a bar.

    Returns:
        An `Attack`; its losses are (N, generations), each that of the best.

    Differences from the paper: parents are drawn from the better half, all alike; tokens are whole words, so
    that the prompt as everybody would type it has the tokens that were found.

    Raises:
        TypeError, ValueError: naming the argument; for an edit that was made for a model with other weights,
            and if what `classify` returns does not fit.
        UnsupportedModelError: if the model's family is not supported, or its tokenizers differ.
    """
    every, prompts, pairs = named(edits), checked_prompts(prompts), list(pairs)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or [type(text) for text in pair] != [str, str]:
            raise TypeError(f"pairs: got {pair!r}, expected prompts with the concept, and without")
    if not pairs:
        raise ValueError("pairs: got none, expected at least one")
    eta, tokens = checked_scale("eta", eta), checked_count("tokens", tokens)
    population = checked_count("population", population, least=2)
    generations = checked_count("generations", generations)
    mutation, crossover = _share("mutation", mutation), _share("crossover", crossover)
    rows, seed = checked_count("rows", rows), checked_seed(seed)
    budget = RowBudget(rows)
    model = models.load(pipe)
    model.check_text_to_image()
    judge = Judge(model, label, classify, k, num_inference_steps, guidance_scale)
    with model.frozen():
        have, lack = (_texts(model, texts) for texts in zip(*pairs, strict=True))
        goals = _texts(model, prompts) + eta * (have - lack).mean(0)
        search = _Search(model, goals, tokens, population, mutation, crossover, seed)
        for generation in tqdm(range(generations), desc="ring_a_bell", disable=not progress):
            search.step(generation)
        found = tuple(search.vocabulary.texts(search.best()))
        hits: dict[str, list[list[bool]]] = {name: [[], []] for name in every}
        pictures: dict[str, list[Tensor]] = {name: [] for name in every}
        base = fingerprint(model)
        for group in groups(every, rows):
            with edited(model, list(group.values()), base=base):
                for kind, texts in enumerate((prompts, found)):
                    done = 0
                    while done < len(texts):
                        some = budget.run(partial(_draw, judge, texts, seed, done, len(group)))
                        done += some.shape[1]
                        for name, shown in zip(group, some, strict=True):
                            hits[name][kind] += judge.hits(shown)
                            pictures[name] += [*shown] if kind else []
    return Attack(
        attack="ring_a_bell",
        label=label,
        rows=tuple(
            {"name": name, "steps": steps} | rate(hit)
            for name in every
            for steps, hit in zip((0, generations), hits[name], strict=True)
        ),
        losses={name: torch.stack(search.losses, dim=1).cpu() for name in every},
        pictures={name: torch.stack(pictures[name]) for name in every},
        prompts=dict.fromkeys(every, found),
        settings={
            "model": repr(model),
            "scheduler": type(model.pipe.scheduler).__name__,
            "pairs": [list(pair) for pair in pairs],
            "prompts": list(prompts),
            "k": judge.k,
            "eta": eta,
            "tokens": tokens,
            "population": population,
            "generations": generations,
            "mutation": mutation,
            "crossover": crossover,
            **judge.settings,
            "seed": seed,
        },
    )


class _Search:
    """A population of prompts for each goal, and how far each of them is from it.

    Args:
        goals: (N, L, d).

    Attributes:
        tokens: (N, population, tokens) int64 on the CPU, the best first.
        losses: (N,), that of the best, before each step.
    """

    def __init__(
        self,
        model: DiffusionModel,
        goals: Tensor,
        tokens: int,
        population: int,
        mutation: float,
        crossover: float,
        seed: int,
    ) -> None:
        self.vocabulary = Vocabulary(model, words=True)
        self._free = FreeTokens(model, ["{}"], tokens, "tokens")
        self._goals, self._mutation, self._crossover = goals, mutation, crossover
        self._budget = RowBudget(_TEXTS)
        self._draws = Draws([f"{seed}/ring_a_bell/{row}" for row in range(len(goals))], torch.device("cpu"))
        self.tokens = (self._uniform("tokens", 0, population, tokens) * len(self.vocabulary)).long()
        self._fitness = self._apart(torch.ones(self.tokens.shape[:2], dtype=torch.bool), self.tokens)
        self.losses: list[Tensor] = []
        self._sort()

    def best(self) -> Tensor:
        return self.tokens[:, 0]

    def step(self, generation: int) -> None:
        """Let the better half have children in the place of the others."""
        self.losses.append(self._fitness[:, 0])
        goals, population, length = self.tokens.shape
        stay = (population + 1) // 2
        born = population - stay

        def chance(what: str, *shape: int) -> Tensor:
            return self._uniform(what, generation, born, *shape)

        parents = (chance("parents", 2) * stay).long()
        rows = torch.arange(goals)[:, None]
        children, others = self.tokens[rows, parents[..., 0]], self.tokens[rows, parents[..., 1]]
        cross = chance("crossover") < self._crossover
        cut = (chance("cut") * (length - 1)).long() + 1  # something of both
        place = torch.arange(length)
        children = torch.where(cross[..., None] & (place >= cut[..., None]), others, children)
        mutate = chance("mutation") < self._mutation
        where = place == (chance("place") * length).long()[..., None]
        drawn = (chance("token") * len(self.vocabulary)).long()
        children = torch.where(mutate[..., None] & where, drawn[..., None], children)
        fitness = self._fitness[rows, parents[..., 0]]
        changed = (children != self.tokens[rows, parents[..., 0]]).any(-1)
        self.tokens = torch.cat((self.tokens[:, :stay], children), dim=1)
        fitness[changed] = self._apart(changed, children)[changed]
        self._fitness = torch.cat((self._fitness[:, :stay], fitness), dim=1)
        self._sort()

    def _sort(self) -> None:
        order = self._fitness.argsort(dim=1, stable=True)
        self._fitness = self._fitness.gather(1, order)
        self.tokens = self.tokens.gather(1, order[..., None].expand_as(self.tokens))

    def _uniform(self, what: str, step: int, *shape: int) -> Tensor:
        return self._draws.uniform(range(len(self._goals)), what, step, shape)

    def _apart(self, which: Tensor, tokens: Tensor) -> Tensor:
        """How far each prompt is from its goal, (N, B) on the CPU; infinite but for `which`."""
        goals, places = which.nonzero(as_tuple=True)
        chosen, found = tokens[goals, places], list[Tensor]()
        while (done := sum(map(len, found))) < len(chosen):
            found.append(self._budget.run(partial(self._distance, chosen[done:], goals[done:])))
        apart = torch.full(which.shape, torch.inf)
        apart[which] = torch.cat([torch.empty(0), *(part.cpu() for part in found)])
        return apart

    def _distance(self, tokens: Tensor, goals: Tensor, count: int) -> Tensor:
        vectors = self.vocabulary.table[tokens[:count].to(self.vocabulary.table.device)]
        text = self._free.encode(self.vocabulary.split(vectors), [0] * len(vectors))
        goal = self._goals[goals[:count].to(self._goals.device)]
        return (text.embeds.float() - goal).square().flatten(1).mean(1)


def _share(name: str, value: float) -> float:
    value = checked_scale(name, value)
    if value > 1:
        raise ValueError(f"{name}: got {value}, expected 0 to 1")
    return value


def _texts(model: DiffusionModel, texts: Sequence[str]) -> Tensor:
    """(B, L, d) float32, B of them at once."""
    parts = [texts[first : first + _TEXTS] for first in range(0, len(texts), _TEXTS)]
    return torch.cat([model.encode_prompt(list(part)).embeds.float() for part in parts])


def _draw(judge: Judge, texts: Sequence[str], seed: int, done: int, edits: int, count: int) -> Tensor:
    """Pictures (edits, B, 3, H, W) of the next prompts, `count` in all and one at least."""
    some = range(done, min(done + max(1, count // edits), len(texts)))
    pictures = judge.draw(
        [texts[row] for row in some for _ in range(edits)], [seed + row for row in some for _ in range(edits)]
    )
    return pictures.unflatten(0, (len(some), edits)).transpose(0, 1)
