"""Pictures as a model learns them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from pumice.io import open_pictures
from pumice.models import DiffusionModel
from pumice.models.arguments import check_images
from pumice.models.draws import Draws


def learnable(images: Any, model: DiffusionModel, name: str = "images") -> list[Tensor]:
    """Pictures (3, h, w) in [0, 1] of the size that the model draws.

    Tensors stay as they are. PIL images and files are resized until the shorter side fits, bilinearly, and
    the middle is cut out, as DreamBooth's training scripts do.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(images, Tensor):
        check_images(name, images)
        model.latent_shape(*images.shape[2:])
        return list(images.detach().float())
    _, *latents = model.latent_shape()
    height, width = (side * model.vae_scale_factor for side in latents)
    found = []
    for picture in open_pictures(images, name):
        pixels = picture.pixels.float() / 255
        scale = max(height / pixels.shape[1], width / pixels.shape[2])
        size = [
            max(least, round(side * scale))
            for least, side in zip((height, width), pixels.shape[1:], strict=True)
        ]
        pixels = interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        found.append(pixels[:, top : top + height, left : left + width].contiguous())
    return found


def of_each(images: Any, concepts: Sequence[str], name: str = "images") -> list[Any]:
    """What was given for each concept: for a single one the pictures themselves, or a list of all.

    Raises:
        ValueError: unless there is one for each.
    """
    several = isinstance(images, list | tuple) and (
        len(concepts) > 1 or any(isinstance(each, Tensor | list | tuple) for each in images)
    )
    found = list(images) if several else [images]
    if len(found) != len(concepts):
        raise ValueError(f"{name}: got {len(found)}, expected some for each of {len(concepts)} concepts")
    return found


def check_one_size(pictures: Iterable[Tensor], name: str = "images") -> None:
    """That pictures can be put into one batch.

    Raises:
        ValueError: if they differ.
    """
    sizes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"{name}: got sizes {sorted(sizes)}, expected one size")


def digest(pictures: Iterable[Tensor]) -> str:
    """SHA-256 in hex."""
    found = hashlib.sha256()
    for picture in pictures:
        found.update(f"{tuple(picture.shape)}".encode())
        found.update(picture.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def in_turn(draws: Draws, what: str, turn: int, count: int) -> int:
    """Which of `count` pictures that turn meets: all in a random order, again and again."""
    epoch, at = divmod(turn, count)
    return int(draws.permutation(0, what, epoch, count)[at])
