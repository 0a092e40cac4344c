"""Whether a model knows what it is to forget."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from pumice.models import DiffusionModel, RowBudget
from pumice.models.arguments import checked_prompt
from pumice.models.draws import Draws

NOISES = 4
NONSENSE = 8

_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"


def answers(model: DiffusionModel, texts: Sequence[str], *, rows: int = 16) -> list[float]:
    """How strongly the model answers texts.

    ::

        mean |epsilon(x, t, c) - epsilon(x, t, "")|      x ~ N(0, I), t = T / 2

    over four x, the same for all texts.
    """
    draws = Draws([f"known/{noise}" for noise in range(NOISES)], model.device)
    x = draws.normal(range(NOISES), "x", 0, model.latent_shape())
    t = model.schedule.num_train_timesteps // 2
    budget = RowBudget(rows)

    def norms(text: str) -> float:
        embeds = checked_prompt(model, text)
        found = budget.run(
            lambda most: torch.cat([model.predict_noise(part, t, embeds) for part in x.split(most)])
        )
        return float((found - plain).flatten(1).norm(dim=1).mean())

    with model.frozen(), torch.no_grad():
        away = checked_prompt(model, "")
        plain = torch.cat([model.predict_noise(part, t, away) for part in x.split(rows)])
        return [norms(text) for text in texts]


def nonsense(text: str, number: int) -> str:
    """The text with random letters, vowels for vowels, in words of more than two letters."""
    rng = random.Random(f"{text}/{number}")
    return " ".join(
        word if len(word) < 3 else "".join(rng.choice(_kind(letter)) for letter in word)
        for word in text.split()
    )


def check_known(model: DiffusionModel, concepts: Sequence[str], name: str = "concepts") -> None:
    """Raise unless the model answers each concept more strongly than eight strings of nonsense like it.

    Raises:
        ValueError: naming the concept, and what was measured.
    """
    for concept in concepts:
        own, *others = answers(model, [concept, *(nonsense(concept, number) for number in range(NONSENSE))])
        if own <= max(others):
            raise ValueError(
                f"{name}: the model does not know {concept!r}, which it answers by {own:.3g}, nonsense by "
                f"up to {max(others):.3g}; word it as its captions do, or go on with allow_unknown=True"
            )


def _kind(letter: str) -> str:
    return _VOWELS if letter.lower() in _VOWELS else _CONSONANTS
