"""Functions of tensors, applied to pictures as people have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pumice.models.arguments import check_images
from pumice.purify.pictures import Pictures


def applied(images: Any, work: Callable[[Tensor], Tensor]) -> Any:
    """What `work` makes of pictures (n, 3, H, W), float32 or float64, in the form in which they came.

    A tensor goes through at once and keeps its gradient; other pictures go one by one, each has its size.
    """
    if not isinstance(images, Tensor):
        pictures = Pictures(images)
        return pictures.finish([work(picture[None])[0] for picture in pictures.given])
    check_images("images", images)
    exact = images if images.dtype == torch.float64 else images.float()
    return work(exact).clamp_(0, 1).to(images.dtype)


def compose(filters: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Several filters as one, the first one first: `compose([jpeg, partial(resize, scale=0.5)])(images)`.

    Args:
        filters: functions of pictures alone, or of this module with arguments bound by `functools.partial`.

    Returns:
        The function of pictures. PIL images and paths are rounded to 8 bits after each filter, tensors are
        not.

    Raises:
        TypeError: for anything that cannot be called.
        ValueError: for no filter at all.
    """
    steps = list(filters)
    if not steps:
        raise ValueError("filters: got an empty list, expected at least one filter")
    for number, step in enumerate(steps):
        if not callable(step):
            raise TypeError(
                f"filters[{number}]: got a {type(step).__name__}, expected a function of pictures"
            )

    def composed(images: Any) -> Any:
        for step in steps:
            images = step(images)
        return images

    return composed
