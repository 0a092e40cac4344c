"""Weighted sums along the rows and columns of pictures: blurs, means over boxes, and other sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pumice import ops

_TURNS = 256  # after so many, weights that still matter are even to 1e-5


@dataclass(frozen=True, eq=False)
class Taps:
    """out_i = sum_k weights_ik x_(places_ik), along one side.

    Attributes:
        places: (n, k) int64, 0 to the length of the side.
        weights: (n, k) float64.
    """

    places: Tensor
    weights: Tensor


def separable(images: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Sums of pictures (B, C, H, W) down by `rows` and across by `columns`, (B, C, h, w); differentiable."""
    return ops.separable_sum(images, rows.places, rows.weights, columns.places, columns.weights)


def gaussian_taps(side: int, sigma: float, reach: int) -> Taps:
    """w_i ~ exp(-i^2 / (2 sigma^2)), |i| <= reach, mirrored at the ends, which are not repeated."""
    period = max(1, 2 * side - 2)
    if 2 * reach < period:
        offsets = torch.arange(-reach, reach + 1)
        weights = torch.softmax(-0.5 * (offsets.double() / sigma).square(), dim=0)
    else:  # once around and more: offsets that come to the same place are one
        offsets = torch.arange(period) - period // 2
        turns = min(reach // period + 1, _TURNS)
        each = offsets[:, None] + period * torch.arange(-turns, turns + 1)
        beyond = each.abs() > min(reach, (_TURNS + 1) * period)
        weights = (-0.5 * (each.double() / sigma).square()).masked_fill(beyond, -math.inf)
        weights = weights.flatten().softmax(0).view_as(each).sum(1)
    places = (torch.arange(side)[:, None] + offsets) % period
    return Taps(torch.minimum(places, period - places), weights.expand(side, -1))


def box_taps(side: int, radius: int) -> Taps:
    """The mean over |i| <= radius, of what lies inside."""
    places = torch.arange(side)[:, None] + torch.arange(-radius, radius + 1)
    inside = ((places >= 0) & (places < side)).double()
    return Taps(places.clamp(0, side - 1), inside / inside.sum(1, keepdim=True))


def resizing_taps(side: int, count: int, kernel: Callable[[Tensor], Tensor], support: int) -> Taps:
    """`count` samples of a side, by a kernel as wide as the larger of their distance and a pixel."""
    step = side / count
    width = max(step, 1.0)
    centres = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) * step
    first = (centres - support * width).floor()
    places = (first + torch.arange(2 * math.ceil(support * width) + 1)).long()
    weights = kernel((places + 0.5 - centres) / width) * ((places >= 0) & (places < side))
    return Taps(places.clamp(0, side - 1), weights / weights.sum(1, keepdim=True))
