"""Pictures in files."""

from __future__ import annotations

from os import PathLike

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


def read_image(path: str | PathLike[str], size: tuple[int, int] | None = None) -> Tensor:
    """A picture as it is meant to be seen, (3, H, W) float32 RGB in [0, 1].

    Args:
        path: of any format that Pillow reads; its EXIF orientation is applied.
        size: (H, W) to resize to, by Lanczos.

    Raises:
        ValueError: if the file cannot be read as a picture.
    """
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"pictures: {str(path)!r} cannot be read: {error}") from error
    if size is not None:
        picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
