"""Pictures that a pipeline draws, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def draw(pipe: Any, seeds: Sequence[int], copies: int, **inputs: Any) -> Tensor:
    """Pictures (copies, B, 3, H, W), uint8 on the CPU, of B seeds.

    The copies of a sample stand beside each other in the batch and start from the same noise, each from a
    generator of its own, so that a picture does not depend on what else is drawn.
    """
    with _bare(pipe):
        images = pipe(
            **inputs,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds for _ in range(copies)],
            output_type="pt",
        ).images
    images = images.float().cpu()
    if not bool(images.isfinite().all()):
        raise ValueError("pipe: it drew pictures that are not finite")
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.unflatten(0, (len(seeds), copies)).transpose(0, 1)


@contextmanager
def _bare(pipe: Any) -> Iterator[None]:
    """Inside the block, no checker blackens pictures, which would look erased, and no bar is shown."""
    checker, bar = getattr(pipe, "safety_checker", None), dict(getattr(pipe, "_progress_bar_config", {}))
    try:
        pipe.set_progress_bar_config(**{**bar, "disable": True})
        if checker is not None:
            pipe.safety_checker = None
        yield
    finally:
        pipe.set_progress_bar_config(**bar)
        if checker is not None:
            pipe.safety_checker = checker
