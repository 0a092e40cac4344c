"""How much of a change of pictures can be seen: PSNR, SSIM, the largest change, LPIPS."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pumice.evaluate.preprocess import check_images
from pumice.evaluate.scores import checked_scores

_WINDOW, _SIGMA = 11, 1.5  # px


@dataclass(frozen=True, eq=False)
class Visibility:
    """What B pictures differ from their originals by, each (B,) float64 on the CPU.

    Attributes:
        psnr: peak signal-to-noise ratio, dB; infinite for pictures that are the same.
        ssim: structural similarity, up to 1.
        max_change: the largest change of a value, in levels of 1/255.
        lpips: perceptual distance; None if there was no network.
    """

    psnr: Tensor
    ssim: Tensor
    max_change: Tensor
    lpips: Tensor | None

    def mean(self) -> dict[str, float | None]:
        """Means over the pictures, the PSNR of their mean squared error, and the largest `max_change`.

        None is what was not measured, and the PSNR if no picture has changed.
        """
        found = {
            "psnr": float(-10 * (10 ** (-self.psnr / 10)).mean().log10()),
            "ssim": float(self.ssim.mean()),
            "max_change": float(self.max_change.max()),
            "lpips": math.nan if self.lpips is None else float(self.lpips.mean()),
        }
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; an infinite PSNR is None."""
        return {
            "psnr": [value if math.isfinite(value) else None for value in self.psnr.tolist()],
            "ssim": self.ssim.tolist(),
            "max_change": self.max_change.tolist(),
            "lpips": None if self.lpips is None else self.lpips.tolist(),
            "mean": self.mean(),
        }


@torch.no_grad()
def visibility(
    images: Tensor, originals: Tensor, *, lpips: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Visibility:
    """Measure what was done to pictures.

    ::

        PSNR = -10 log10 mean (x - x0)^2
        SSIM = mean over windows of (2 mu mu0 + 0.01^2) (2 cov + 0.03^2)
               / ((mu^2 + mu0^2 + 0.01^2) (var + var0 + 0.03^2))

    in floating point, of values in [0, 1]. SSIM (Wang et al., 2004) has Gaussian windows of 11 x 11, sigma
    1.5, that lie inside the picture, and is the mean over windows and colours.

    Args:
        images: (B, 3, H, W) floating, in [0, 1], sides of 11 or more.
        originals: of the same shape.
        lpips: two batches of pictures (B, 3, H, W) in [0, 1] to (B,), such as an LPIPS network (Zhang et al.,
            arXiv:1801.03924); the networks themselves want [-1, 1].

    Returns:
        A `Visibility`.

    Raises:
        TypeError: if pictures are no floating tensors.
        ValueError: for other shapes or values, and if what `lpips` returns does not fit.
    """
    check_images("images", images)
    check_images("originals", originals)
    if images.shape != originals.shape or min(images.shape[2:]) < _WINDOW:
        raise ValueError(
            f"images, originals: got shapes {tuple(images.shape)} and {tuple(originals.shape)}, expected the "
            f"same, sides of {_WINDOW} or more"
        )
    distance = None
    if lpips is not None:
        distance = checked_scores("lpips", lpips(images, originals), len(images))
    # in float32 rounding would be most of a small difference of means and squares
    x, x0 = images.double().cpu(), originals.double().cpu()
    return Visibility(
        psnr=-10 * (x - x0).square().mean((1, 2, 3)).log10(),
        ssim=_ssim(x, x0),
        max_change=255 * (x - x0).abs().amax((1, 2, 3)),
        lpips=distance,
    )


def _ssim(x: Tensor, x0: Tensor) -> Tensor:
    offset = torch.arange(_WINDOW, dtype=x.dtype) - _WINDOW // 2
    weight = torch.softmax(-(offset**2) / (2 * _SIGMA**2), dim=0)
    column = weight.view(1, 1, -1, 1).expand(x.shape[1], 1, -1, 1)

    def mean(values: Tensor) -> Tensor:
        values = F.conv2d(values, column, groups=x.shape[1])
        return F.conv2d(values, column.transpose(2, 3), groups=x.shape[1])

    mu, mu0 = mean(x), mean(x0)
    variances = mean(x * x) - mu**2 + mean(x0 * x0) - mu0**2
    covariance = mean(x * x0) - mu * mu0
    light = (2 * mu * mu0 + 0.01**2) / (mu**2 + mu0**2 + 0.01**2)
    return (light * (2 * covariance + 0.03**2) / (variances + 0.03**2)).mean((1, 2, 3))
