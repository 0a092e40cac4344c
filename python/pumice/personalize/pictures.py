"""Pictures of a subject or class as a model learns them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from pumice.io import open_pictures
from pumice.models import DiffusionModel
from pumice.models.arguments import check_images
from pumice.models.draws import Draws

from .arguments import warn


def of_subject(images: Any, model: DiffusionModel) -> list[Tensor]:
    """`learnable` pictures of what is to be learned; of a single one it is warned."""
    found = learnable(images, model)
    if len(found) == 1:
        warn("images: got 1 picture, which will be learned by heart; 4 or more show what a subject is")
    return found


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


def digest(pictures: Sequence[Tensor]) -> str:
    """SHA-256 in hex."""
    found = hashlib.sha256()
    for picture in pictures:
        found.update(f"{tuple(picture.shape)}".encode())
        found.update(picture.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def of_step(draws: Draws, step: int, batch_size: int, count: int) -> list[int]:
    """Which of `count` pictures a step meets, all in a random order again and again."""
    found = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, at = divmod(place, count)
        found.append(int(draws.permutation(0, "order", epoch, count)[at]))
    return found
