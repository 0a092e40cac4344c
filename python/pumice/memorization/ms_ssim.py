"""How alike the shapes of two pictures are, whatever their brightness and contrast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def min_max(x: Tensor) -> Tensor:
    """Every channel of every sample of (B, C, h, w) stretched to [0, 1]."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale structural similarity (Wang et al., 2003) of each pair of pictures.

    ::

        cs = (2 cov(a, b) + 0.03^2) / (var a + var b + 0.03^2)
        l  = (2 mean a mean b + 0.01^2) / (mean a^2 + mean b^2 + 0.01^2)
        MS-SSIM = product over scales of max(mean cs, 0)^0.33, with mean(l cs) at the last

    Means, variances and the covariance are those of Gaussian windows inside the picture. Three scales, each
    half as large as the one before, windows of 11 x 11 with sigma 1.5. For pictures whose third scale is
    smaller than 11, the window is the largest odd one that fits there, sigma in proportion; if that is
    smaller than 3, there are fewer scales.

    Args:
        a, b: (B, C, h, w) floating, in [0, 1].

    Returns:
        (B,), up to 1, in the dtype of a.

    Raises:
        ValueError: if shapes differ or a side is smaller than 3.
    """
    if a.shape != b.shape or a.dim() != 4 or min(a.shape[2:]) < 3:
        raise ValueError(
            f"a, b: got shapes {tuple(a.shape)} and {tuple(b.shape)}, "
            "expected the same (B, C, h, w), sides of 3 or more"
        )
    scales, window = _windows(min(a.shape[2:]))
    offset = torch.arange(window, dtype=a.dtype, device=a.device) - window // 2
    weight = torch.softmax(-(offset**2) / (2 * (1.5 * window / 11) ** 2), dim=0)
    channels = a.shape[1]
    column = weight.reshape(1, 1, -1, 1).expand(channels, 1, -1, 1)

    def mean(x: Tensor) -> Tensor:
        x = F.conv2d(x, column, groups=channels)
        return F.conv2d(x, column.transpose(2, 3), groups=channels)

    found = torch.ones(len(a), dtype=a.dtype, device=a.device)
    for scale in range(scales):
        mean_a, mean_b = mean(a), mean(b)
        variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
        similar = (2 * (mean(a * b) - mean_a * mean_b) + 0.03**2) / (variances + 0.03**2)
        if scale + 1 == scales:
            similar = similar * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        found = found * similar.mean((1, 2, 3)).clamp_min(0) ** 0.33
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return found


def _windows(side: int) -> tuple[int, int]:
    """How many scales, and how large their windows."""
    for scales in (3, 2, 1):
        smallest = side >> (scales - 1)
        if smallest >= 3:
            break
    return scales, min(11, smallest - 1 + smallest % 2)
