"""What filters over a window share: checks of their arguments, and planes without gaps for their kernels."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pumice.ops import _layout


def check_images(images: Tensor) -> None:
    _layout.check_float("images", images)
    if images.dim() != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (B, C, H, W)")


def check_size(size: int, largest: int) -> None:
    if isinstance(size, bool) or not isinstance(size, Integral):
        raise TypeError(f"size: got {type(size).__name__}, expected an odd int")
    if size % 2 == 0 or not 1 <= size <= largest:
        raise ValueError(f"size: got {size}, expected an odd number from 1 to {largest}")


def filtered(into: Callable[..., None]) -> Callable[..., Tensor]:
    """A backend out of `into(out, images, ...)`, which works on contiguous tensors."""

    def run(images: Tensor, *rest: Any) -> Tensor:
        out = torch.empty_like(images)
        if images.numel() == 0:
            return out
        planes = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        into(planes, images.contiguous(), *rest)
        return out if planes is out else out.copy_(planes)

    return run
