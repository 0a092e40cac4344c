"""What saving a picture takes from it."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pumice import ops
from pumice.models.arguments import checked_count
from pumice.purify.pictures import Pictures

from .applying import applied
from .resizing import resize

_LONGEST = 65500  # pixels a side, of libjpeg


def jpeg(images: Any, quality: int = 75, *, differentiable: bool = False) -> Any:
    """Save pictures as JPEG, 4:2:0, and read them again.

    By libjpeg through Pillow, in memory, one picture a thread; no gradient flows through it.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        quality: 1 to 100. Default 75, libjpeg's own and that of the published evaluations of protections
            (DiffShortcut, arXiv:2406.18944).
        differentiable: by `pumice.ops.differentiable_jpeg` instead, which has a gradient and keeps values
            between levels: a result about a level away from that of libjpeg.

    Returns:
        The pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    quality = _checked("quality", quality, 1, 100)
    if differentiable:
        return applied(images, lambda x: ops.differentiable_jpeg(x, quality))
    pictures = Pictures(images)
    for picture in pictures.given:
        if max(picture.shape) > _LONGEST:
            sides = "{1} x {0}".format(*picture.shape[1:])
            raise ValueError(f"images: got {sides} pixels, expected at most {_LONGEST} a side, as of JPEG")
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return pictures.finish(list(threads.map(lambda picture: _saved(picture, quality), pictures.given)))


def bit_depth(images: Any, bits: int = 5) -> Any:
    """Round pictures to fewer levels, round(x (2^bits - 1)) / (2^bits - 1).

    (Xu et al., Feature Squeezing, NDSS 2018, arXiv:1704.01155.) No gradient flows through.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        bits: of a value, 1 to 8. Default 5, the paper's for photographs; 3 is that of Guo et al., ICLR 2018.

    Returns:
        The pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    top = 2 ** _checked("bits", bits, 1, 8) - 1
    return applied(images, lambda x: (x.detach() * top).round_().div_(top))


def compress_and_resize(images: Any, quality: int = 75, scale: float = 0.5) -> Any:
    """`jpeg`, then `resize` by Lanczos and back: what happens to pictures on their way through the web.

    As a sequence it undoes protections that withstand each of its parts (arXiv:2604.23688, whose numbers
    are the defaults). No gradient flows through.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        quality: of `jpeg`.
        scale: of `resize`.

    Returns:
        The pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    return resize(jpeg(images, quality), scale)


def _saved(picture: Tensor, quality: int) -> Tensor:
    """(3, H, W) and the like; Pillow puts channels next to each other faster than a tensor does."""
    levels = (picture * 255).round_().to("cpu", torch.uint8).contiguous().numpy()
    buffer = io.BytesIO()
    bands = [Image.fromarray(band) for band in levels]
    Image.merge("RGB", bands).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(buffer) as image:
        read = np.stack([np.asarray(band) for band in image.split()])
    return torch.from_numpy(read).to(picture.device, torch.float32).div_(255)


def _checked(name: str, value: int, least: int, most: int) -> int:
    if checked_count(name, value, least=least) > most:
        raise ValueError(f"{name}: got {value}, expected {least} to {most}")
    return int(value)
