"""A mean over the neighbours of every pixel that are near to it in place and in colour."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from pumice import _native
from pumice.ops import _layout, _window
from pumice.ops._registry import DTYPES, register

LARGEST = 31
CHANNELS = 4
NARROWEST, WIDEST = 1e-6, 1e30


def bilateral_filter(images: Tensor, size: int, sigma_color: float, sigma_space: float) -> Tensor:
    """Smooth pictures without blurring their edges (Tomasi and Manduchi, 1998).

    ::

        out_p = sum_q w_pq x_q / sum_q w_pq
        w_pq  = exp(-|p - q|^2 / (2 sigma_space^2)) exp(-d_pq^2 / (2 sigma_color^2))
        d_pq  = sum over the channels of |x_p - x_q|

    for the pixels q in the disc |p - q| <= size // 2. Outside of the picture it is mirrored about its first
    and last rows and columns, which are not repeated. Disc, mirror and distance of colours are those of
    OpenCV's ``bilateralFilter`` with ``d=size``; its tabulated weights are computed here, a difference of
    about 1e-6.

    Args:
        images: (B, C, H, W) with 1 to 4 channels, float32, float16 or bfloat16 (or float64: plain torch).
        size: the diameter of the disc in pixels; odd, 1 to 31.
        sigma_color: in the unit of the pictures, 1e-6 to 1e30; OpenCV's number for 8-bit pictures is 255
            times that of pictures in [0, 1].
        sigma_space: in pixels, 1e-6 to 1e30.

    Returns:
        The filtered pictures, typed and laid out as images. No gradient flows through them.

    A pixel with a NaN among its neighbours becomes NaN in all channels.

    Raises:
        TypeError: images of another dtype or kind, a size that is no int, a sigma that is no number.
        ValueError: images that are not (B, C, H, W) or have more than 4 channels, a size that is even or out
            of its range, a sigma out of its range.
    """
    _window.check_images(images)
    if not 1 <= images.shape[1] <= CHANNELS:
        raise ValueError(f"images: got {images.shape[1]} channels, expected 1 to {CHANNELS}")
    _window.check_size(size, LARGEST)
    for name, sigma in (("sigma_color", sigma_color), ("sigma_space", sigma_space)):
        if isinstance(sigma, bool) or not isinstance(sigma, Real):
            raise TypeError(f"{name}: got {type(sigma).__name__}, expected a number")
        if not NARROWEST <= sigma <= WIDEST:
            raise ValueError(f"{name}: got {sigma}, expected a number from {NARROWEST} to {WIDEST}")
    out: Tensor = torch.ops.pumice.bilateral_filter(
        images.detach(), size, float(sigma_color), float(sigma_space)
    )
    return out


def reference(images: Tensor, size: int, sigma_color: float, sigma_space: float) -> Tensor:
    x = images if images.dtype == torch.float64 else images.float()
    radius, (height, width) = size // 2, x.shape[2:]
    rows, columns = (_mirrored(length, radius).to(x.device) for length in (height, width))
    padded = x[:, :, rows[:, None], columns]
    sums, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    for i in range(size):
        for j in range(size):
            squared = (i - radius) ** 2 + (j - radius) ** 2
            if squared > radius**2:
                continue
            other = padded[:, :, i : i + height, j : j + width]
            distance = (x - other).abs().sum(1, keepdim=True)
            weight = torch.exp(-squared / (2 * sigma_space**2) - (distance / sigma_color) ** 2 / 2)
            sums += weight * other
            weights += weight
    return (sums / weights).to(images.dtype)


def _mirrored(length: int, radius: int) -> Tensor:
    """Where positions -radius to length - 1 + radius of a row of `length` come from."""
    period = max(2 * (length - 1), 1)
    i = torch.arange(-radius, length + radius).abs() % period
    return torch.where(i < length, i, period - i)


def _exponents(sigma_color: float, sigma_space: float) -> tuple[float, float]:
    """What squared distances in place and in colour are multiplied by, under a power of 2."""
    half = -0.5 / math.log(2)
    return half / sigma_space**2, half / sigma_color**2


def _native_into(extension: str) -> Callable[..., None]:
    def into(out: Tensor, images: Tensor, size: int, sigma_color: float, sigma_space: float) -> None:
        _native.extension(extension).bilateral_filter(
            out.data_ptr(),
            images.data_ptr(),
            DTYPES[images.dtype],
            *images.shape,
            size,
            *_exponents(sigma_color, sigma_space),
            *_layout.execution(images),
        )

    return into


def _triton_into(out: Tensor, images: Tensor, size: int, sigma_color: float, sigma_space: float) -> None:
    from pumice.triton_kernels.bilateral_filter import bilateral_filter as launch

    launch(out, images, size, *_exponents(sigma_color, sigma_space))


def _torch_into(out: Tensor, images: Tensor, size: int, sigma_color: float, sigma_space: float) -> None:
    out.copy_(reference(images, size, sigma_color, sigma_space))


_INTO = {
    "torch": _torch_into,
    "cpu": _native_into("_cpu"),
    "cuda": _native_into("_cuda"),
    "triton": _triton_into,
}

register(
    "bilateral_filter",
    "(Tensor images, int size, float sigma_color, float sigma_space) -> Tensor",
    fake=lambda images, *_: torch.empty_like(images),
    backends={name: _window.filtered(into) for name, into in _INTO.items()},
)
