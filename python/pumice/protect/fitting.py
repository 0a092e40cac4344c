"""How a picture of any size meets a model that has a size of its own: resized, in tiles, or as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pumice.models import DiffusionModel

Size = Literal["resize", "tiles", "native"]

LONGEST = 16  # times the shorter side, resized: what a pass takes of memory grows with it


class Fit(Protocol):
    """Working pictures of a given one, and a change of it of changes of them.

    No value of the whole change is larger than the largest of the parts': it is a convex combination.
    """

    def parts(self, picture: Tensor) -> list[Tensor]:
        """(3, H, W) in [0, 1] to working pictures (3, h, w) in [0, 1]."""
        ...

    def masks(self, mask: Tensor) -> list[Tensor]:
        """(1, H, W) to where working pictures may change, (1, h, w)."""
        ...

    def whole(self, changes: Sequence[Tensor]) -> Tensor:
        """Changes of the working pictures to that of the given one, (3, H, W)."""
        ...


@dataclass(frozen=True)
class Resized:
    """One working picture of another size; its change is resized back, not the picture."""

    given: tuple[int, int]
    working: tuple[int, int]

    def parts(self, picture: Tensor) -> list[Tensor]:
        resized = interpolate(picture[None], self.working, mode="bicubic", antialias=True)[0]
        return [resized.clamp(0, 1)]

    def masks(self, mask: Tensor) -> list[Tensor]:
        return [interpolate(mask[None], self.working, mode="bilinear", antialias=True)[0]]

    def whole(self, changes: Sequence[Tensor]) -> Tensor:
        return interpolate(changes[0][None], self.given, mode="bilinear", antialias=True)[0]


@dataclass(frozen=True)
class Tiles:
    """Overlapping tiles at the picture's own size; where several lie on a pixel, their changes are blended.

    Tiles are spread evenly and overlap by an eighth of their sides at least. Their weights fall linearly
    to their edges and are 1 in sum. Where the picture is smaller than a tile it is mirrored; what will be
    cut off again does not change.
    """

    given: tuple[int, int]
    tile: tuple[int, int]

    def parts(self, picture: Tensor) -> list[Tensor]:
        rows, columns = map(_mirrored, self.given, self.tile)
        return [picture[:, i][:, :, j].contiguous() for i in rows for j in columns]

    def masks(self, mask: Tensor) -> list[Tensor]:
        masks = self.parts(mask)
        for each in masks:
            each[:, self.given[0] :] = 0
            each[:, :, self.given[1] :] = 0
        return masks

    def whole(self, changes: Sequence[Tensor]) -> Tensor:
        found = changes[0].new_zeros(3, *self.given)
        rows, columns = map(_weights, self.given, self.tile)
        places = [(i, j) for i in rows for j in columns]
        for change, ((top, down), (left, across)) in zip(changes, places, strict=True):
            height, width = len(down), len(across)
            weighted = change[:, :height, :width] * (down[:, None] * across).to(change)
            found[:, top : top + height, left : left + width] += weighted
        return found


def stride(models: Sequence[DiffusionModel]) -> int:
    """What sides of pictures must be multiples of for all of the models' autoencoders."""
    return math.lcm(*(model.vae_scale_factor for model in models))


def fit(height: int, width: int, models: Sequence[DiffusionModel], size: Size, name: str = "images") -> Fit:
    """How a picture of `height` x `width` pixels meets the models, the first of which has the say.

    "resize": the shorter side becomes the model's own, the longer one follows, rounded to what the denoiser
    can halve as often as it does (64 pixels for Stable Diffusion 1 and 2, 32 for XL). "tiles": pieces of the
    model's own size. "native": as it is, mirrored up to what the autoencoders take.

    Raises:
        ValueError: "resize" for a picture more than `LONGEST` times as long as wide, called `name`.
    """
    step = stride(models)
    ceiled = (_ceiled(height, step), _ceiled(width, step))
    if size == "native":
        return Tiles((height, width), ceiled)
    _, *latents = models[0].latent_shape()
    scale = models[0].vae_scale_factor
    own = [_ceiled(side * scale, step) for side in latents]
    if size == "tiles":
        return Tiles((height, width), (min(own[0], ceiled[0]), min(own[1], ceiled[1])))
    ratio = max(height, width) / min(height, width)
    if ratio > LONGEST:
        raise ValueError(
            f"{name}: got {height} x {width} pixels, expected at most {LONGEST} times as long as wide "
            "for size='resize'; size='tiles' takes any"
        )
    halved = math.lcm(step, scale * 2 ** (len(models[0].unet.config.block_out_channels) - 1))
    shorter = min(own)
    longer = max(shorter, round(shorter * ratio / halved) * halved)
    return Resized((height, width), (shorter, longer) if height <= width else (longer, shorter))


def _ceiled(side: int, step: int) -> int:
    return -(-side // step) * step


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along a side."""
    rest = length - tile
    if rest <= 0:
        return [0]
    steps = math.ceil(rest / (tile - tile // 8))
    return [round(step * rest / steps) for step in range(steps + 1)]


def _mirrored(length: int, tile: int) -> list[Tensor]:
    """For each tile the pixels along a side of which it is made."""
    found = []
    for start in _starts(length, tile):
        place = torch.arange(start, start + tile) % (2 * length)
        found.append(torch.minimum(place, 2 * length - 1 - place))
    return found


def _weights(length: int, tile: int) -> list[tuple[int, Tensor]]:
    """For each tile where it begins, and the weights of its pixels that the picture has, float32."""
    starts = _starts(length, tile)
    place = torch.arange(length)
    hats = torch.stack([torch.minimum(place - start + 1, start + tile - place) for start in starts])
    weights = hats.clamp(min=0).double()
    weights = (weights / weights.sum(0)).float()
    return [(start, row[start : start + tile]) for start, row in zip(starts, weights, strict=True)]
