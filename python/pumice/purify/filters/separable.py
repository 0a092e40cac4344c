"""Weighted sums along the rows and columns of pictures: blurs, means over boxes, and other sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True, eq=False)
class Taps:
    """out_i = sum_k weights_ik x_(places_ik), along one side.

    Attributes:
        places: (n, k) int64, 0 to the length of the side.
        weights: (n, k) float64.
    """

    places: Tensor
    weights: Tensor

    def to(self, like: Tensor) -> Taps:
        return Taps(self.places.to(like.device), self.weights.to(like.device, like.dtype))


def separable(images: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Sums of pictures (B, C, H, W) down by `rows` and across by `columns`, (B, C, h, w).

    Differentiable. A bag of embeddings is a weighted sum of rows that is fast everywhere; plane by plane all
    stays in the cache.
    """
    rows, columns = rows.to(images), columns.to(images)
    planes = [_summed(_summed(plane, rows).t(), columns).t() for plane in images.flatten(0, 1)]
    return torch.stack([plane.contiguous() for plane in planes]).unflatten(0, images.shape[:2])


def gaussian_taps(side: int, sigma: float, reach: int) -> Taps:
    """w_i ~ exp(-i^2 / (2 sigma^2)), |i| <= reach, mirrored at the ends, which are not repeated."""
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.softmax(-0.5 * (offsets.double() / sigma).square(), dim=0)
    period = max(1, 2 * side - 2)
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


def _summed(plane: Tensor, taps: Taps) -> Tensor:
    """(side, m) to (n, m)."""
    weights = taps.weights.contiguous()
    return embedding_bag(taps.places, plane.contiguous(), per_sample_weights=weights, mode="sum")
