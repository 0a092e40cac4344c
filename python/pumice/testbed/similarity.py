"""How alike two pictures of the testbed's world are: what "replayed" means there."""

from __future__ import annotations

import torch
from torch import Tensor

REPLAYED = 0.8
"""A picture more similar than this to a memorized one replays it."""


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the pixel values of every picture of `a` (A, 3, H, W) with every one of `b`, (A, B).

    A replay and its training picture have 0.98 or more, two different memorized pictures at most 0.54.
    """
    a, b = (
        torch.nn.functional.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True), dim=1)
        for x in (a, b)
    )
    return a @ b.T
