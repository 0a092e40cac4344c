"""The median of the square around every pixel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pumice import _native
from pumice.ops import _layout, _window
from pumice.ops._registry import DTYPES, register

LARGEST = 15
WINDOWS = 2**22  # values of windows that the reference holds at once


def median_filter(images: Tensor, size: int) -> Tensor:
    """Replace every value by the median of its neighbourhood, channel by channel (Tukey, 1977).

    ::

        out[b, c, y, x] = median of images[b, c, y + i, x + j] over |i|, |j| <= size // 2

    where the edges of the picture are repeated outside of it, as in OpenCV's ``medianBlur``.

    Args:
        images: (B, C, H, W), float32, float16 or bfloat16, of any range (or float64: plain torch).
        size: of the square, in pixels; odd, 1 to 15.

    Returns:
        The filtered pictures, typed and laid out as images; every value is one of images. No gradient flows
        through them.

    A value whose neighbourhood contains a NaN becomes NaN; infinities are ordinary values.

    Raises:
        TypeError: images of another dtype or kind, a size that is no int.
        ValueError: images that are not (B, C, H, W), a size that is even or out of its range.
    """
    _window.check_images(images)
    _window.check_size(size, LARGEST)
    out: Tensor = torch.ops.pumice.median_filter(images.detach(), size)
    return out


def reference(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[2:]
    around = torch.arange(size, device=images.device) - size // 2
    rows = (torch.arange(height, device=images.device)[:, None] + around).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device)[:, None] + around).clamp(0, width - 1)
    out = torch.empty_like(images)
    strip = max(1, WINDOWS * height // (images.numel() * size**2))  # rows at once
    for top in range(0, height, strip):
        some = rows[top : top + strip]
        windows = images[:, :, some[:, None, :, None], columns[None, :, None, :]]  # (B, C, h, W, size, size)
        out[:, :, top : top + strip] = windows.flatten(-2).median(dim=-1).values
    return out


def _native_into(extension: str) -> Callable[..., None]:
    def into(out: Tensor, images: Tensor, size: int) -> None:
        if size == 1:
            out.copy_(images)
            return
        height, width = images.shape[2:]
        _native.extension(extension).median_filter(
            out.data_ptr(),
            images.data_ptr(),
            DTYPES[images.dtype],
            images.shape[0] * images.shape[1],
            height,
            width,
            size,
            *_layout.execution(images),
        )

    return into


def _triton_into(out: Tensor, images: Tensor, size: int) -> None:
    from pumice.triton_kernels.median_filter import median_filter as launch

    launch(out, images, size)


def _torch_into(out: Tensor, images: Tensor, size: int) -> None:
    out.copy_(reference(images, size))


_INTO = {
    "torch": _torch_into,
    "cpu": _native_into("_cpu"),
    "cuda": _native_into("_cuda"),
    "triton": _triton_into,
}

register(
    "median_filter",
    "(Tensor images, int size) -> Tensor",
    fake=lambda images, *_: torch.empty_like(images),
    backends={name: _window.filtered(into) for name, into in _INTO.items()},
)
