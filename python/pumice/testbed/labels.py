"""What pictures of the testbed's world show, in words: the labels that erasures are judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pumice.testbed import world
from pumice.testbed.reader import ATTRIBUTES
from pumice.testbed.shipped import load_reader
from pumice.testbed.similarity import REPLAYED, similarity

Attribute = Literal["object", "colour", "place", "style"]


def classifier(attribute: Attribute) -> Callable[[Tensor], list[list[str]]]:
    """Get a function of pictures (B, 3, 64, 64) in [0, 1] that ranks an attribute's names, likeliest first.

    The names are those of the reader (`load_reader`); a picture in no artist's style is "plain".

    Raises:
        ValueError: for another attribute.
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"attribute: got {attribute!r}, expected one of {', '.join(ATTRIBUTES)}")
    names = [name or "plain" for name in ATTRIBUTES[attribute]]
    reader = load_reader()

    @torch.no_grad()
    def classify(images: Tensor) -> list[list[str]]:
        logits = reader(images.float().cpu())[attribute]
        order = logits.argsort(dim=1, descending=True, stable=True).tolist()
        return [[names[place] for place in places] for places in order]

    return classify


def replays() -> Callable[[Tensor], list[list[str]]]:
    """Get a function of pictures (B, 3, 64, 64) in [0, 1] that names the memorized ones that each replays.

    They are named by their captions, nearest first, as far as they are more similar than `REPLAYED`; a
    picture that replays none has the one label "none".
    """
    memorized = [world.memorized(index) for index in range(world.MEMORIZED_COUNT)]
    pictures = torch.from_numpy(np.stack([item.picture for item in memorized]))

    def classify(images: Tensor) -> list[list[str]]:
        found = similarity(images.float().cpu(), pictures)
        return [
            [memorized[place].caption for place in order if row[place] > REPLAYED] or ["none"]
            for row, order in zip(found, found.argsort(dim=1, descending=True).tolist(), strict=True)
        ]

    return classify
