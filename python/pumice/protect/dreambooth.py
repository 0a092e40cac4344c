"""What keeps a surrogate from drifting: pictures of its subject's class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pumice.models import DiffusionModel
from pumice.models.arguments import check_prompt, check_scale, checked_count
from pumice.training.examples import Examples, draw_class

from .pictures import Pictures


def class_examples(
    model: DiffusionModel,
    images: Any,
    prompt: str,
    *,
    count: int,
    needed: int,
    weight: float,
    seed: int | Sequence[int],
    progress: bool,
) -> list[Examples]:
    """The pictures of the class as one set of examples, or none where they would weigh nothing.

    Args:
        model: that is trained.
        images: as of the methods; None lets the model draw them, by 50 steps of DDIM with guidance 7.5.
        prompt: of the class.
        count: how many are drawn.
        needed: how many of these a training can meet; the others are not drawn.
        weight: of their part of the loss.
        seed, progress: as of the methods.
    """
    check_prompt("class_prompt", prompt)
    check_scale("prior_weight", weight)
    count = min(checked_count("num_class_images", count), needed)
    if not weight or not needed:
        return []
    if images is not None:
        pictures = Pictures(images, [model], name="class_images").working
    else:
        pictures = draw_class(model, prompt, count, seed, progress)
    return [Examples(model, pictures, prompt, weight=weight)]
