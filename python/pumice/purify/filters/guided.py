"""The guided filter (He, Sun and Tang, ECCV 2010), and AdverseCleaner, which ends with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice import ops
from pumice.models.arguments import check_scale, checked_count
from pumice.purify.pictures import Pictures

from .separable import box_taps, separable


def guided(images: Any, radius: int = 4, eps: float = 0.1**2, *, guide: Any = None) -> Any:
    """Smooth pictures where a guide is smooth: in each box a picture is a linear function of the guide.

    ::

        q_i = mean_k(a_k) . I_i + mean_k(b_k)                              over the boxes k that hold pixel i
        a_k = (cov_k(I, I) + eps U)^-1 cov_k(I, p),    b_k = mean_k(p) - a_k . mean_k(I)

    with I the colours of the guide (3 of them), p a channel of the picture, q of the result, and U the
    identity (He, Sun and Tang, IEEE TPAMI 35, 2013). Boxes are cut at the border. Sums are in float32, which
    for an eps of 1e-5 can be off by a level where colours of the guide depend on each other.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        radius: of the boxes in px, which are 2 radius + 1 wide.
        eps: which variances count as edges, in the square of the unit of the pictures. Defaults 4 and 0.1^2,
            out of the range that the paper shows: 2 to 8, 0.1^2 to 0.4^2.
        guide: as many pictures as images, of the same sizes; by default the pictures themselves.

    Returns:
        The pictures, in the form in which they came; no gradient flows through.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    radius = checked_count("radius", radius)
    check_scale("eps", eps, positive=True)
    pictures = Pictures(images)
    guides = pictures if guide is None else Pictures(guide, "guide")
    sizes, expected = ([tuple(each.shape[1:]) for each in some.given] for some in (guides, pictures))
    if sizes != expected:
        raise ValueError(f"guide: got pictures of {sizes}, expected those of images, {expected}")
    return pictures.finish(
        [
            _Guide(by.to(picture.device), radius, eps)(picture)
            for by, picture in zip(guides.given, pictures.given, strict=True)
        ]
    )


def adverse_cleaner(
    images: Any,
    *,
    iterations: int = 64,
    size: int = 5,
    sigma_color: float = 8 / 255,
    sigma_space: float = 8.0,
    guided_iterations: int = 4,
    radius: int = 4,
    eps: float = (4 / 255) ** 2,
) -> Any:
    """AdverseCleaner: many bilateral filters, then edges brought back by the guided filter.

    ::

        y <- bilateral(y)          `iterations` times, from the picture x
        y <- guided(y, guide=x)    `guided_iterations` times

    The tool (Zhang, 2023) came without a paper, and its repository is gone: the defaults are those under
    which it is remembered (64 times 5, 8, 8, then 4 times 4, 16, on a scale of 255), not checked against it.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        iterations, size, sigma_color, sigma_space: of `bilateral`.
        guided_iterations, radius, eps: of `guided`.

    Returns:
        The pictures, in the form in which they came; no gradient flows through.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    iterations = checked_count("iterations", iterations, least=0)
    guided_iterations = checked_count("guided_iterations", guided_iterations, least=0)
    radius = checked_count("radius", radius)
    check_scale("eps", eps, positive=True)
    pictures, cleaned = Pictures(images), []
    for picture in pictures.given:
        y = picture[None]
        for _ in range(iterations):
            y = ops.bilateral_filter(y, size, sigma_color, sigma_space)
        guide, now = _Guide(picture, radius, eps), y[0]
        for _ in range(guided_iterations):
            now = guide(now)
        cleaned.append(now)
    return pictures.finish(cleaned)


class _Guide:
    """A guide (3, H, W): its means and the factors of its covariances, for any number of pictures."""

    def __init__(self, guide: Tensor, radius: int, eps: float) -> None:
        self._guide, self._taps = guide, [box_taps(side, radius) for side in guide.shape[1:]]
        red, green, blue = guide
        self._mean = self._means(guide)
        means = self._means(torch.stack((red, red, red, green, green, blue)) * guide[[0, 1, 2, 1, 2, 2]])
        rr, rg, rb, gg, gb, bb = means - self._mean[[0, 0, 0, 1, 1, 2]] * self._mean[[0, 1, 2, 1, 2, 2]]
        self._covariance = torch.stack((rr, rg, rb, rg, gg, gb, rb, gb, bb)).unflatten(0, (3, 3))
        # L D L^T of the covariance plus eps; no pivot can be less than eps, but for rounding
        self._d1 = rr.clamp(min=0) + eps
        self._l21, self._l31 = rg / self._d1, rb / self._d1
        self._d2 = (gg - self._l21**2 * self._d1).clamp(min=0) + eps
        self._l32 = (gb - self._l31 * self._l21 * self._d1) / self._d2
        self._d3 = (bb - self._l31**2 * self._d1 - self._l32**2 * self._d2).clamp(min=0) + eps

    def __call__(self, picture: Tensor) -> Tensor:
        """(3, H, W) filtered."""
        guide = self._guide
        if picture is guide:
            mean, covariance = self._mean, self._covariance
        else:
            mean = self._means(picture)
            products = self._means((guide[:, None] * picture).flatten(0, 1)).unflatten(0, (3, 3))
            covariance = products - self._mean[:, None] * mean
        a = self._solved(covariance)
        b = mean - _dot(a, self._mean)
        means = self._means(torch.cat((a.flatten(0, 1), b)))
        return _dot(means[:9].unflatten(0, (3, 3)), guide) + means[9:]

    def _solved(self, right: Tensor) -> Tensor:
        """(cov + eps U)^-1 of columns (3, n, H, W)."""
        first = right[0]
        second = right[1] - self._l21 * first
        third = (right[2] - self._l31 * first - self._l32 * second) / self._d3
        second = second / self._d2 - self._l32 * third
        first = first / self._d1 - self._l21 * second - self._l31 * third
        return torch.stack((first, second, third))

    def _means(self, planes: Tensor) -> Tensor:
        return separable(planes[None], *self._taps)[0]


def _dot(a: Tensor, colours: Tensor) -> Tensor:
    """(3, n, H, W) with (3, H, W), (n, H, W)."""
    return a[0] * colours[0] + a[1] * colours[1] + a[2] * colours[2]
