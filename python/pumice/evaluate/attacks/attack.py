"""What every attack on an edit finds, and how its success is counted."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pumice.evaluate.drawing import checked_edits, checked_labels
from pumice.evaluate.erasure import Classify
from pumice.memorization.arguments import checked_seeds as each_once
from pumice.memorization.statistics import clopper_pearson
from pumice.models import DiffusionModel, Edit, PromptEmbeds, RowBudget
from pumice.models.arguments import check_scale, checked_count
from pumice.models.drawing import draw
from pumice.training.pictures import learnable

_COLUMNS = 6  # budgets that a table shows


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Attack:
    """How often an attack brought a concept back, on the model as it is, "none", and on each edited one.

    Attributes:
        attack: the function that made it.
        label: of the concept.
        rows: one an edit and budget of steps, of plain numbers; rates are in per cent.

            - name, steps
            - success, success_low, success_high: share of pictures that have the label among the first k, and
              its 95 % Clopper-Pearson interval
            - esr: 100 - success, the ESR-k under attack
        losses: by name, (runs, steps) float32, each before its update; NaN where a run was over before.
        pictures: by name, (runs, ..., 3, H, W) uint8 on the CPU, the last that were drawn.
        prompts: by name, the prompt that each run found, if that is what the attack looks for.
        settings: of the run.
    """

    attack: str
    label: str
    rows: tuple[dict[str, Any], ...]
    losses: dict[str, Tensor]
    pictures: dict[str, Tensor]
    prompts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    settings: dict[str, Any]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.attack} of {self.label!r}, {', '.join(self.names)})"

    @property
    def names(self) -> list[str]:
        """ "none", and the edits."""
        return list(dict.fromkeys(row["name"] for row in self.rows))

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(steps, success of the best restart) of an edit, at each budget."""
        found: dict[int, float] = {}
        for row in self.rows:
            if row["name"] == name:
                found[row["steps"]] = max(row["success"], found.get(row["steps"], 0.0))
        if not found:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(map(repr, self.names))}")
        return sorted(found.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON, without tensors but the losses."""
        return {
            "attack": self.attack,
            "label": self.label,
            "rows": [dict(row) for row in self.rows],
            "losses": {
                name: [[loss if math.isfinite(loss) else None for loss in run] for run in found.tolist()]
                for name, found in self.losses.items()
            },
            "prompts": {name: list(found) for name, found in self.prompts.items()},
            "settings": dict(self.settings),
        }

    def table(self) -> list[tuple[str, ...]]:
        """Success of the best restart at each budget to be read, an edit a line, under a line of titles; of
        many budgets the first, the last and some between."""
        curves = {name: self.curve(name) for name in self.names}
        budgets = [steps for steps, _ in next(iter(curves.values()))]
        last = len(budgets) - 1
        shown = sorted({round(last * part / (_COLUMNS - 1)) for part in range(_COLUMNS)})
        return [
            ("edit", *(f"{budgets[place]} steps" for place in shown)),
            *((name, *(f"{curve[place][1]:.1f}" for place in shown)) for name, curve in curves.items()),
        ]


class Judge:
    """Draws with prompts as an attack has them, and tells which pictures show the concept.

    Args:
        model: that draws.
        label, classify, k, num_inference_steps, guidance_scale: as `concept_inversion` takes them.
        height, width: px, by default the model's own.

    Attributes:
        k: as given.
        settings: of drawing.
    """

    def __init__(
        self,
        model: DiffusionModel,
        label: str,
        classify: Classify,
        k: int,
        num_inference_steps: int,
        guidance_scale: float,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        if not isinstance(label, str):
            raise TypeError(f"label: got a {type(label).__name__}, expected a string")
        size = model.latent_shape(height, width)[1:]
        self._model, self._label, self._classify = model, label.casefold(), classify
        self.k = checked_count("k", k)
        self.settings = {
            "num_inference_steps": checked_count("num_inference_steps", num_inference_steps),
            "guidance_scale": checked_scale("guidance_scale", guidance_scale),
            "height": size[0] * model.vae_scale_factor,
            "width": size[1] * model.vae_scale_factor,
        }

    @torch.no_grad()
    def draw(self, text: PromptEmbeds | Sequence[str], seeds: Sequence[int]) -> Tensor:
        """A picture of each prompt, (B, 3, H, W) uint8 on the CPU, from a seed each."""
        if isinstance(text, PromptEmbeds):
            inputs: dict[str, Any] = {"prompt_embeds": text.embeds}
            if text.pooled is not None:
                inputs["pooled_prompt_embeds"] = text.pooled
        else:
            inputs = {"prompt": list(text)}
        return draw(self._model.pipe, seeds, 1, **inputs, **self.settings)[0]

    def draw_all(self, texts: Sequence[str], seeds: Sequence[int], rows: int) -> Tensor:
        """As `draw`, so many at once; halved on out-of-memory. The model draws all in the same way."""
        budget, found = RowBudget(rows), list[Tensor]()
        while (done := sum(map(len, found))) < len(texts):
            found.append(budget.run(partial(self._some, texts[done:], seeds[done:])))
        return torch.cat(found)

    def of(self, model: DiffusionModel) -> Judge:
        """The same, of what another model draws."""
        other = copy.copy(self)
        other._model = model
        return other

    def _some(self, texts: Sequence[str], seeds: Sequence[int], count: int) -> Tensor:
        return self.draw(texts[:count], seeds[:count])

    def hits(self, pictures: Tensor) -> list[bool]:
        """Whether each picture (B, 3, H, W) uint8 has the label among the first k."""
        labels = checked_labels(self._classify(pictures / 255), len(pictures))
        return [self._label in one[: self.k] for one in labels]


def rate(hits: Sequence[bool]) -> dict[str, float]:
    """The share of pictures that show the concept, its interval, and what is missing from 100 %."""
    low, high = clopper_pearson(sum(hits), len(hits))
    success = 100 * sum(hits) / len(hits)
    return {
        "success": success,
        "success_low": 100 * low,
        "success_high": 100 * high,
        "esr": 100 - success,
    }


def named(edits: Edit | Mapping[str, Edit]) -> dict[str, Edit | None]:
    """Edits by name, one by its method, behind the model as it is."""
    return checked_edits({edits.method: edits} if isinstance(edits, Edit) else edits)


def checked_scale(name: str, value: float, *, positive: bool = False) -> float:
    check_scale(name, value, positive=positive)
    return float(value)


def checked_seed(seed: int) -> int:
    return checked_count("seed", seed, least=0)


def checked_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds 0, 1, ... of a number of them, or those of a list."""
    if isinstance(seeds, Sequence) and not isinstance(seeds, str):
        return each_once([checked_count("seeds", seed, least=0) for seed in seeds])
    return each_once(checked_count("seeds", seeds))


def checked_budgets(checkpoints: Sequence[int], steps: int) -> list[int]:
    """The numbers of steps at which success is measured, rising to all of them."""
    if not isinstance(checkpoints, Iterable):
        raise TypeError(f"checkpoints: got a {type(checkpoints).__name__}, expected whole numbers")
    found = sorted({*(checked_count("checkpoints", each, least=0) for each in checkpoints), steps})
    if found[-1] > steps:
        raise ValueError(f"checkpoints: got {list(checkpoints)}, expected 0 to steps = {steps}")
    return found


def batch_of(images: Any, model: DiffusionModel) -> Tensor:
    """Pictures (N, 3, H, W) float32 as the model learns them."""
    return torch.stack(learnable(images, model))


@torch.no_grad()
def encoded(model: DiffusionModel, pictures: Tensor, rows: int) -> Tensor:
    """Latents (N, C, h, w) float32, so many pictures at a time."""
    return torch.cat([model.encode_image(part) for part in pictures.split(rows)])
