"""Which of a concept's candidates a step works on, and how that choice becomes the worst for the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from accelerate.utils import reduce
from torch import Tensor

from pumice.erase.trainer import Trainer
from pumice.models import Added, DiffusionModel, PromptEmbeds, RowBudget, Shifted
from pumice.training.processes import processes, sum_gradients

Search = Literal["gumbel", "exhaustive", "linear"]
SearchGradient = Literal["paper", "code"]

LATENTS = 4
"""How many latents exhaustive search looks at."""

_PURPOSES = ("training", "search")


def gumbel_softmax(
    logits: Tensor, uniform: Tensor, temperature: float, *, hard: bool = True, top_k: int | None = None
) -> Tensor:
    """Weights of a random mixture, or of one that is drawn by softmax(logits) whatever the temperature.

    ::

        y = softmax((logits + g) / temperature)      g = -log(-log(u + 1e-10) + 1e-10)

    Args:
        logits: (n,).
        uniform: u, (n,) in [0, 1).
        temperature: tau.
        hard: in the place of y the one-hot vector of its largest weight; gradients stay those of y.
        top_k: of a mixture, let so many of the largest weights stand, and divide by their sum.
    """
    gumbel = -torch.log(-torch.log(uniform + 1e-10) + 1e-10)
    y = ((logits + gumbel) / temperature).softmax(-1)
    if hard:  # the difference is zero to the bit
        return torch.zeros_like(y).index_fill(-1, y.argmax(-1), 1.0) + (y - y.detach())
    if top_k is not None and top_k < len(y):
        y = torch.zeros_like(y).index_fill(-1, y.topk(top_k).indices, 1.0) * y
        y = y / y.sum()
    return y


def check_search_gradient(value: str) -> None:
    if value not in get_args(SearchGradient):
        raise ValueError(f"search_gradient: got {value!r}, expected 'paper' or 'code'")


def denoised(model: DiffusionModel, z: Tensor, t: Tensor, texts: PromptEmbeds) -> Tensor:
    """x0 as the model sees it in z (B, C, h, w) at t (B,)."""
    return model.schedule.to_x0(model.predict(z, t, texts), z, t)


class ConceptSearch:
    """Logits over the candidates of each concept, and what was drawn from them for the latents at hand.

    A step has two draws a row: one that the model trains on, and one that the logits learn from. Both are
    made when the latents are drawn, and kept with them.

    Args:
        trainer: of which it is a part.
        candidates: of each of its concepts.
        temperature, hard, top_k: of `gumbel_softmax`.
        learning_rate: Adam's, of the logits.
        pending: steps whose latents are drawn at once.
        rows: of a pass; halved on out-of-memory.

    Attributes:
        state: tensors, changed in place.
    """

    def __init__(
        self,
        trainer: Trainer,
        candidates: Sequence[Sequence[str]],
        *,
        temperature: float,
        hard: bool,
        top_k: int | None = None,
        learning_rate: float,
        pending: int,
        rows: int,
    ) -> None:
        self._trainer, self._candidates = trainer, candidates
        if not isinstance(hard, bool):
            raise TypeError(f"hard: got {hard!r}, expected a bool")
        self._temperature, self._hard, self._top_k = temperature, hard, top_k
        self._pending, self._budget = pending, RowBudget(rows)
        self._texts = [trainer.encode(texts) for texts in candidates]
        device, most = trainer.model.device, max(map(len, candidates))
        self._logits = [
            torch.full((len(texts),), 1 / len(texts), device=device, requires_grad=True)
            for texts in candidates
        ]
        self._optimizer, self._learning_rate = torch.optim.Adam(self._logits, learning_rate), learning_rate
        self._weights = torch.zeros(pending, len(_PURPOSES), trainer.count, most, device=device)
        self._largest = torch.zeros(self._weights.shape[:-1], dtype=torch.long)  # on the CPU, at hand
        self._origins = torch.zeros(pending, dtype=torch.long)
        self._counts = torch.zeros(len(candidates), most, dtype=torch.long)
        self.state = {
            "search.weights": self._weights,
            "search.largest": self._largest,
            "search.origins": self._origins,
            "search.counts": self._counts,
        }
        for number, logits in enumerate(self._logits):
            moments: dict[str, Tensor] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(logits),
                "exp_avg_sq": torch.zeros_like(logits),
            }
            self._optimizer.state[logits] = moments
            parts = {"logits": logits, **moments}
            self.state |= {f"search.{number}.{name}": tensor for name, tensor in parts.items()}

    @torch.no_grad()
    def draw(self, step: int) -> tuple[PromptEmbeds, PromptEmbeds]:
        """Draw for the rows of a step whose latents are about to be drawn: to train on, to search with."""
        place, rows = step % self._pending, range(self._trainer.count)
        self._origins[place] = step
        self._weights[place] = 0
        for number in range(len(_PURPOSES)):
            for row in rows:
                drawn = self._drawn(step, number, row)
                self._weights[place, number, row, : len(drawn)] = drawn
        self._largest[place] = self._weights[place].argmax(-1).cpu()
        return self.training(step, rows), self._mixed(step, 1, rows)

    def concepts(self, step: int) -> list[str]:
        """Those of the rows of a step, as its latents were drawn."""
        return self._trainer.of_step(int(self._origins[step % self._pending]))

    def training(self, step: int, rows: Sequence[int]) -> PromptEmbeds:
        """What some rows of a step train on."""
        return self._mixed(step, 0, rows)

    def searching(self, step: int, rows: Sequence[int]) -> PromptEmbeds:
        """What some rows search with: as it was drawn, with the gradient of the logits as they are now."""
        return self._mixed(step, 1, rows, gradient=True)

    def ascend(self, gain: Callable[[Sequence[int]], Tensor]) -> None:
        """One step of Adam of the logits up the sum over rows of `gain`.

        Raises:
            ValueError: if a gradient is not finite.
        """
        state = processes(self._trainer.model.device)
        mine = range(self._trainer.count)[state.process_index :: state.num_processes]

        scale = self._trainer.part.scale

        def backward(most: int) -> None:
            self._optimizer.zero_grad()
            for start in range(0, len(mine), most):
                (-scale * gain(mine[start : start + most])).backward()

        with self._trainer.student.frozen(), torch.enable_grad():
            self._budget.run(backward)
        sum_gradients(state, self._logits)
        gradients = [logits.grad.div_(scale) for logits in self._logits if logits.grad is not None]
        if not bool(torch.cat(gradients).isfinite().all()):
            raise ValueError(
                f"search_learning_rate: got {self._learning_rate:g}, at which a gradient of the search is "
                "not finite; a smaller rate, or a wider dtype of the pipeline, may do"
            )
        self._optimizer.step()

    @torch.no_grad()
    def settle(self, scores: Callable[[PromptEmbeds], Tensor]) -> None:
        """From now on draw, of each concept, the candidate with the highest score."""
        for logits, texts in zip(self._logits, self._texts, strict=True):
            best = int(reduce(scores(texts), "sum").argmax())  # one for all processes
            logits.fill_(-math.inf)
            logits[best] = 0

    def count(self, step: int) -> None:
        """Note what a step trained on, by its largest weight."""
        picked = self._largest[step % self._pending, 0].tolist()
        for concept, index in zip(self.concepts(step), picked, strict=True):
            self._counts[self._trainer.concepts.index(concept), index] += 1

    def often(self) -> dict[str, dict[str, int]]:
        """By concept how often each candidate was trained on, most often first."""
        found: dict[str, Any] = {}
        for concept, texts, counts in zip(
            self._trainer.concepts, self._candidates, self._counts.tolist(), strict=True
        ):
            times = zip(texts, counts, strict=False)
            found[concept] = {text: n for text, n in sorted(times, key=lambda each: -each[1]) if n}
        return found

    def _drawn(self, step: int, number: int, row: int) -> Tensor:
        """(n,), a function of the logits."""
        concept = self._trainer.of_step(step)[row]
        logits = self._logits[self._trainer.concepts.index(concept)]
        what = f"gumbel {_PURPOSES[number]}"
        uniform = self._trainer.draws.uniform([row], what, step, logits.shape)[0]
        return gumbel_softmax(logits, uniform, self._temperature, hard=self._hard, top_k=self._top_k)

    def _mixed(self, step: int, number: int, rows: Sequence[int], *, gradient: bool = False) -> PromptEmbeds:
        place, concepts, found = step % self._pending, self.concepts(step), []
        for row in rows:
            texts = self._texts[self._trainer.concepts.index(concepts[row])]
            weights = self._weights[place, number, row, : len(texts)]
            if gradient:
                drawn = self._drawn(int(self._origins[place]), number, row)
                weights = weights + (drawn - drawn.detach())
            found.append(_mixture(weights, texts, int(self._largest[place, number, row])))
        return PromptEmbeds.cat(found)


def _mixture(weights: Tensor, texts: PromptEmbeds, largest: int) -> PromptEmbeds:
    """sum_k weights_k texts_k, one prompt; its tokens are those of the one of the largest weight."""

    def mixed(values: Tensor) -> Tensor:
        return torch.tensordot(weights, values.to(weights.dtype), 1)[None]

    pooled = None if texts.pooled is None else mixed(texts.pooled)
    return PromptEmbeds(mixed(texts.embeds), pooled, (texts.tokens[largest],))


@torch.no_grad()
def moved(
    model: DiffusionModel, student: DiffusionModel, z: Tensor, t: Tensor, texts: PromptEmbeds, rows: int
) -> Tensor:
    """How far each text's x0 has moved: mean |x0'(z, t, c_k) - x0(z, t, c_k)|^2 over all z (B, C, h, w)."""
    pairs = [(text, place) for text in range(len(texts)) for place in range(len(z))]
    budget, found = RowBudget(rows), list[Tensor]()
    done = 0

    def some(most: int) -> Tensor:
        some_texts, places = map(list, zip(*pairs[done : done + most], strict=True))
        at = z[places], t[places], texts[some_texts]
        return (denoised(student, *at) - denoised(model, *at)).square().flatten(1).mean(1)

    while done < len(pairs):
        found.append(budget.run(some))
        done += len(found[-1])
    return torch.cat(found).view(len(texts), len(z)).mean(1)


@torch.no_grad()
def read_differently(trainer: Trainer, texts: PromptEmbeds) -> Tensor:
    """How far keys and values of each text have moved, without a pass.

    ::

        sum_l |dW_l E_k|_F^2 = tr(E_k D E_k^T)      D = sum_l dW_l^T dW_l

    over all projections to keys and values of cross-attention.
    """
    device = texts.embeds.device
    embeds = texts.embeds.float()
    found = torch.zeros(embeds.shape[-1], embeds.shape[-1], device=device)
    for name, change in trainer.part.changes().items():
        if ".attn2.to_k." in name or ".attn2.to_v." in name:
            if isinstance(change, Added):
                up, down = change.up.to(device), change.down.to(device)
                found += down.T @ (up.T @ up) @ down
            elif isinstance(change, Shifted):
                delta = change.delta.to(device)
                found += delta.T @ delta
    return ((embeds @ found) * embeds).sum((1, 2))
