"""Whether a model knows what it is to forget."""

from __future__ import annotations

import random
import string
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from pumice.models import DiffusionModel, PromptEmbeds, RowBudget
from pumice.models.arguments import checked_prompt
from pumice.models.draws import Draws

NOISES = 4
NONSENSE = 8

_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
_FORM = frozenset("a an and at by for from in of on or the to with".split())
"""Words that say nothing by themselves."""


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

    def predicted(embeds: PromptEmbeds) -> Tensor:
        return budget.run(
            lambda most: torch.cat([model.predict_noise(part, t, embeds) for part in x.split(most)])
        )

    with model.frozen(), torch.no_grad():
        plain = predicted(checked_prompt(model, ""))
        found = (predicted(checked_prompt(model, text)) - plain for text in texts)
        return [float(each.flatten(1).norm(dim=1).mean()) for each in found]


def nonsense(text: str, number: int) -> str:
    """The text with random letters, vowels for vowels, digits for digits; articles and the like stay."""
    rng = random.Random(f"{text}/{number}")
    words = text.split()
    kept = _FORM if any(word.casefold() not in _FORM for word in words) else frozenset[str]()
    return " ".join(
        word if word.casefold() in kept else "".join(_other(letter, rng) for letter in word) for word in words
    )


def check_known(
    model: DiffusionModel, concepts: Sequence[str], name: str = "concepts", *, rows: int = 16
) -> None:
    """Raise unless the model answers each concept more strongly than eight strings of nonsense like it.

    Raises:
        ValueError: naming the concept, what was measured, and a wording of it that the model knows.
    """
    for concept in concepts:
        own, other = _measured(model, concept, rows)
        if own > other:
            continue
        article = "an" if _kind(concept.strip()[:1]) == _VOWELS else "a"
        wordings = [f"{article} {concept}", f"in the style of {concept}"]
        known = [each for each in wordings if (found := _measured(model, each, rows))[0] > found[1]]
        hint = f"it knows {known[0]!r}" if known else "word it as its captions do"
        raise ValueError(
            f"{name}: the model does not know {concept!r}, which it answers by {own:.3g}, nonsense by "
            f"up to {other:.3g}; {hint}, or go on with allow_unknown=True"
        )


def _measured(model: DiffusionModel, text: str, rows: int) -> tuple[float, float]:
    """The answer to a text, and the largest to nonsense like it."""
    drawn = dict.fromkeys(nonsense(text, number) for number in range(NONSENSE))
    own, *others = answers(model, [text, *(each for each in drawn if each != text)], rows=rows)
    return own, max(others, default=0.0)


def _other(letter: str, rng: random.Random) -> str:
    return letter if unicodedata.category(letter).startswith("P") else rng.choice(_kind(letter))


def _kind(letter: str) -> str:
    """What may stand for a letter; in scripts without vowels and consonants any letter."""
    base = unicodedata.normalize("NFD", letter)[:1].lower()
    for kind in (_VOWELS, _CONSONANTS, string.digits):
        if base and base in kind:
            return kind
    return string.ascii_lowercase
