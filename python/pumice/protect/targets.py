"""What latents are pulled towards: the picture of a pattern, encoded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pumice.io import Picture
from pumice.models import DiffusionModel
from pumice.models.arguments import check_images

from .pictures import Pictures

# Capitals of 5 x 7 pixels.
_LETTERS = {
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "I": "11111 00100 00100 00100 00100 00100 11111",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111",
}


def text_pattern(height: int, width: int) -> Tensor:
    """A word written over and over, white on black, (3, height, width) float32 in [0, 1].

    Mist's target is such a picture: of high contrast and the same everywhere. Every second line is moved by
    half a word; letters are 5/64 of the shorter side high.
    """
    word = [np.array([list(row) for row in _LETTERS[letter].split()], np.float32) for letter in "PUMICE"]
    line = np.concatenate([np.pad(letter, ((1, 1), (0, 1))) for letter in word], axis=1)
    tile = np.concatenate([line, np.roll(line, line.shape[1] // 2, axis=1)])
    scale = max(1, min(height, width) // 64)
    rows, columns = np.arange(height) // scale % len(tile), np.arange(width) // scale % tile.shape[1]
    return torch.from_numpy(tile[rows][:, columns]).expand(3, -1, -1).contiguous()


def target_latents(target: Any, model: DiffusionModel, pictures: Pictures) -> list[Tensor]:
    """For each working picture the latents (C, h, w) of its target: the mean of the encoder's posterior.

    Args:
        target: None for `text_pattern`; a picture for all: (3, H, W) or (1, 3, H, W) of the pictures' size,
            a PIL image or a path, which are resized to it; or (B, 3, H, W), one for each.
    """
    found: dict[tuple[Any, ...], Tensor] = {}
    latents = []
    for (number, _), picture in zip(pictures.parts, pictures.working, strict=True):
        size = (picture.shape[1], picture.shape[2])
        each = isinstance(target, Tensor) and target.ndim == 4 and len(target) > 1
        key = (*size, number if each else None)
        if key not in found:
            image = target_image(target, number, pictures.given, size)
            with model.frozen(), torch.no_grad():
                found[key] = model.encode_image(image[None].to(model.device))[0]
            if not bool(found[key].isfinite().all()):
                raise ValueError(f"target: its latents are not finite in {model.vae.dtype}")
        latents.append(found[key])
    return latents


def target_image(target: Any, number: int, given: int, size: tuple[int, int]) -> Tensor:
    """The target (3, *size) of one of the given pictures; `target` as of `target_latents`."""
    if target is None:
        return text_pattern(*size)
    if isinstance(target, Tensor):
        images = target[None] if target.ndim == 3 else target
        check_images("target", images)
        if len(images) not in (1, given) or images.shape[2:] != size:
            raise ValueError(
                f"target: got shape {tuple(target.shape)}, expected 1 or {given} pictures of "
                f"{size[0]} x {size[1]}"
            )
        return images[number if len(images) > 1 else 0].float()
    if isinstance(target, list | tuple):
        raise TypeError("target: got a list, expected a tensor, a PIL image or a path")
    pixels = Picture.open(target, "target").pixels.float() / 255
    return interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
