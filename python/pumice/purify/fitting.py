"""A picture of any size before a model that has a size of its own."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from .pictures import mirrored, resized

Size = Literal["resize", "native"]

LONGEST = 16  # times the shorter side, resized: what a pass takes of memory grows with it


def check_size(size: Size) -> None:
    if size not in get_args(Size):
        raise ValueError(f"size: got {size!r}, expected one of {', '.join(get_args(Size))}")


def ceiled(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def fitted(picture: Tensor, own: int | None, multiple: int, size: Size) -> Tensor:
    """A picture (3, H, W) as a model takes it.

    Args:
        picture: in [0, 1].
        own: px, the model's size, or None where it has none.
        multiple: what sides must be multiples of.
        size: "resize" makes the shorter side `own`, or the next multiple, "native" mirrors the picture up to
            the next multiples.

    Raises:
        ValueError: for another size, or "resize" where the model has none or the picture is more than
            `LONGEST` times as long as wide.
    """
    check_size(size)
    height, width = picture.shape[1:]
    if size == "native":
        return mirrored(picture, (ceiled(height, multiple), ceiled(width, multiple)))
    if own is None:
        raise ValueError("size: got 'resize' for a denoiser that has no size of its own, expected 'native'")
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(
            f"images: got {height} x {width} pixels, expected at most {LONGEST} times as long as wide to be "
            "resized; size='native' takes any"
        )
    shorter = ceiled(own, multiple)
    scale = shorter / min(height, width)
    sides = [max(shorter, round(side * scale / multiple) * multiple) for side in (height, width)]
    return resized(picture, (sides[0], sides[1]))


def unfitted(now: Tensor, was: Tensor, size: Size) -> Tensor:
    """The result of what `fitted` made, at the size of the picture that was."""
    height, width = was.shape[1:]
    return resized(now, (height, width)) if size == "resize" else now[:, :height, :width]
