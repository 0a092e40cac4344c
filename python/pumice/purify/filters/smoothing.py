"""Means and medians over the neighbours of each pixel."""

from __future__ import annotations

import math
from typing import Any

from pumice import ops
from pumice.models.arguments import check_scale, checked_count

from .applying import applied
from .separable import gaussian_taps, separable

_FLAT = 1e9  # px: over any picture the weights are even


def gaussian(images: Any, sigma: float = 5.0, kernel_size: int | None = None) -> Any:
    """Blur pictures with weights w_i ~ exp(-i^2 / (2 sigma^2)) along rows and columns.

    The weights sum to 1; outside of the picture it is mirrored about its first and last pixels. The gradient
    of a tensor flows through. Pillow's `GaussianBlur` is an approximation of this by boxes.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        sigma: in px, above 0. Default 5, of the published evaluation of protections (DiffShortcut,
            arXiv:2406.18944), which is a strong blur; protections are trained against 0.1 to 2.
        kernel_size: how many weights, odd. By default those up to 4 sigma, as OpenCV and SciPy take.

    Returns:
        The pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    check_scale("sigma", sigma, positive=True)
    sigma = min(float(sigma), _FLAT)
    if kernel_size is None:
        reach = math.ceil(4 * sigma)
    else:
        reach = checked_count("kernel_size", kernel_size) // 2
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, expected an odd number")
    return applied(
        images, lambda x: separable(x, *(gaussian_taps(side, sigma, reach) for side in x.shape[2:]))
    )


def median(images: Any, size: int = 3) -> Any:
    """`pumice.ops.median_filter`: the median of the square around each pixel, channel by channel.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        size: of the square in px, odd, 1 to 15. Default 3, of Xu et al. (arXiv:1704.01155), who also take 2.

    Returns:
        The pictures, in the form in which they came; no gradient flows through.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    return applied(images, lambda x: ops.median_filter(x, size))


def bilateral(images: Any, size: int = 9, sigma_color: float = 75 / 255, sigma_space: float = 75.0) -> Any:
    """`pumice.ops.bilateral_filter`: a mean over neighbours that are near in place and in colour.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        size: the diameter of the neighbourhood in px, odd, 1 to 31.
        sigma_color: in the unit of the pictures.
        sigma_space: in px. Defaults 9, 75 / 255 and 75, of OpenCV's tutorial.

    Returns:
        The pictures, in the form in which they came; no gradient flows through.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    return applied(images, lambda x: ops.bilateral_filter(x, size, sigma_color, sigma_space))


def total_variation(
    images: Any, weight: float = 0.1, *, iterations: int = 100, isotropic: bool = True
) -> Any:
    """`pumice.ops.total_variation`: the nearest picture of few and short edges, by Rudin, Osher and Fatemi.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        weight: of the total variation of each channel, at least 0. Default 0.1, scikit-image's.
        iterations: default 100.
        isotropic: whether edges cost the same in every direction.

    Returns:
        The pictures, in the form in which they came; no gradient flows through.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    return applied(
        images, lambda x: ops.total_variation(x, weight, iterations=iterations, isotropic=isotropic)
    )
