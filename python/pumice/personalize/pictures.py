"""Which pictures of a subject are learned, and when."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pumice.models import DiffusionModel
from pumice.models.draws import Draws
from pumice.training.pictures import in_turn, learnable

from .arguments import warn


def of_subject(images: Any, model: DiffusionModel) -> list[Tensor]:
    """`learnable` pictures of what is to be learned; of a single one it is warned."""
    found = learnable(images, model)
    if len(found) == 1:
        warn("images: got 1 picture, which will be learned by heart; 4 or more show what a subject is")
    return found


def of_step(draws: Draws, step: int, batch_size: int, count: int) -> list[int]:
    """Which of `count` pictures a step meets, all in a random order again and again."""
    turns = range(step * batch_size, (step + 1) * batch_size)
    return [in_turn(draws, "order", turn, count) for turn in turns]
