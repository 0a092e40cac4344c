"""What may happen to protected pictures, as differentiable functions with random numbers of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pumice.models.draws import Draws
from pumice.ops import differentiable_jpeg
from pumice.ops.differentiable_jpeg import quantization_tables


class Transform(Protocol):
    """A random, differentiable change of pictures that keeps their size.

    Called with pictures (n, 3, H, W) in [0, 1] and what was drawn, it gives the like.
    """

    @property
    def __call__(self) -> Callable[..., Tensor]: ...

    def draw(self, pictures: Sequence[int], step: int, draws: Draws) -> tuple[Tensor, ...]:
        """The random numbers of one step, for each picture."""
        ...


@dataclass(frozen=True)
class Resize:
    """Pictures made smaller and blown up again, without aliasing, as by `interpolate(antialias=True)`.

    Both sides are multiplied by a number drawn from `scale`, rounded to pixels, and come back to what they
    were. Kernels are bilinear, or cubic with a = -0.5, as of Pillow.

    Args:
        scale: the smallest and the largest, in (0, 1].
        mode: the kernel, both ways.
    """

    scale: tuple[float, float] = (0.5, 1.0)
    mode: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        _check_interval("scale", self.scale, 1)
        if self.mode not in _KERNELS:
            raise ValueError(f"mode: got {self.mode!r}, expected 'bilinear' or 'bicubic'")

    def draw(self, pictures: Sequence[int], step: int, draws: Draws) -> tuple[Tensor, ...]:
        return (_between(self.scale, draws.uniform(pictures, "resize", step)),)

    def __call__(self, images: Tensor, scale: Tensor) -> Tensor:
        def there_and_back(side: int) -> Tensor:
            small = (scale * side).round().clamp(min=1)
            full = torch.full_like(small, side)
            down = _resampling(side, start=torch.zeros_like(full), length=full, count=small, mode=self.mode)
            up = _resampling(side, start=torch.zeros_like(full), length=small, count=full, mode=self.mode)
            return up @ down

        resized = _along_sides(images, there_and_back)
        return resized if self.mode == "bilinear" else resized.clamp(0, 1)  # only cubic kernels overshoot


@dataclass(frozen=True)
class Crop:
    """A part of the picture, blown up to its size, bilinearly.

    The part's sides are the picture's times a number drawn from `scale`, rounded to pixels; where it lies is
    drawn, too.

    Args:
        scale: the smallest and the largest, in (0, 1].
    """

    scale: tuple[float, float] = (0.8, 1.0)

    def __post_init__(self) -> None:
        _check_interval("scale", self.scale, 1)

    def draw(self, pictures: Sequence[int], step: int, draws: Draws) -> tuple[Tensor, ...]:
        scale, top, left = draws.uniform(pictures, "crop", step, (3,)).unbind(1)
        return _between(self.scale, scale), top, left

    def __call__(self, images: Tensor, scale: Tensor, top: Tensor, left: Tensor) -> Tensor:
        def part(side: int, share: Tensor) -> Tensor:
            length = (scale * side).round().clamp(min=1)
            start = (share * (side - length + 1)).floor()
            return _resampling(side, start=start, length=length, count=torch.full_like(length, side))

        rows, columns = part(images.shape[2], top), part(images.shape[3], left)
        return _separable(images, rows, columns)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur w_i ~ exp(-i^2 / (2 sigma^2)) of weights that sum to 1, mirrored at the edges.

    The defaults are those of MetaCloak (Liu et al., CVPR 2024), torchvision's own.

    Args:
        kernel_size: in px, odd.
        sigma: the smallest and the largest, in px.
    """

    kernel_size: int = 7
    sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {self.kernel_size}, expected an odd number")
        _check_interval("sigma", self.sigma, math.inf)

    def draw(self, pictures: Sequence[int], step: int, draws: Draws) -> tuple[Tensor, ...]:
        return (_between(self.sigma, draws.uniform(pictures, "blur", step)),)

    def __call__(self, images: Tensor, sigma: Tensor) -> Tensor:
        reach = self.kernel_size // 2
        if reach >= min(images.shape[2:]):
            raise ValueError(
                f"kernel_size: got {self.kernel_size}, expected less than twice the side of pictures of "
                f"{images.shape[2]} x {images.shape[3]}"
            )
        offsets = torch.arange(-reach, reach + 1, device=images.device)
        weights = torch.softmax(-0.5 * (offsets / sigma[:, None]).square(), dim=1)

        def mixing(side: int) -> Tensor:
            period = max(1, 2 * side - 2)
            source = (torch.arange(side, device=images.device)[:, None] + offsets) % period
            source = torch.minimum(source, period - source)  # mirrored, the edge not repeated
            which = source[..., None] == torch.arange(side, device=images.device)
            return torch.einsum("nk,ikj->nij", weights, which.to(weights.dtype))

        return _along_sides(images, mixing)


@dataclass(frozen=True)
class Flip:
    """Left and right exchanged.

    Args:
        p: how probable that is.
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p: got {self.p}, expected 0 to 1")

    def draw(self, pictures: Sequence[int], step: int, draws: Draws) -> tuple[Tensor, ...]:
        return (draws.uniform(pictures, "flip", step) < self.p,)

    def __call__(self, images: Tensor, flipped: Tensor) -> Tensor:
        return torch.where(flipped[:, None, None, None], images.flip(3), images)


@dataclass(frozen=True)
class JPEG:
    """Pictures saved as JPEG and read again, by `pumice.ops.differentiable_jpeg`.

    Args:
        quality: the lowest and the highest, 1 to 100; each whole number between is as probable.
    """

    quality: tuple[int, int] = (50, 95)

    def __post_init__(self) -> None:
        _check_interval("quality", self.quality, 100)
        if not all(isinstance(each, int) for each in self.quality):
            raise TypeError(f"quality: got {self.quality}, expected whole numbers")

    def draw(self, pictures: Sequence[int], step: int, draws: Draws) -> tuple[Tensor, ...]:
        low, high = self.quality
        return (quantization_tables(low + draws.integers(pictures, "jpeg", step, high - low + 1)),)

    def __call__(self, images: Tensor, tables: Tensor) -> Tensor:
        return differentiable_jpeg(images, tables)


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _bicubic(x: Tensor, a: float = -0.5) -> Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": _bilinear, "bicubic": _bicubic}


def _resampling(side: int, *, start: Tensor, length: Tensor, count: Tensor, mode: str = "bilinear") -> Tensor:
    """(n, side, side) that make `count` samples of pixels `start` to `start + length`; more rows are 0.

    Each picture has sizes of its own (n,), and all shapes stay the same: a CUDA graph holds for every draw.
    """
    start, length, count = (x[:, None, None] for x in (start, length, count))
    index = torch.arange(side, dtype=length.dtype, device=length.device)
    step = length / count
    centre = start + (index[:, None] + 0.5) * step
    weights = _KERNELS[mode]((index + 0.5 - centre) / step.clamp(min=1))
    weights = weights * ((index >= start) & (index < start + length) & (index[:, None] < count))
    total = weights.sum(2, keepdim=True)
    return weights / torch.where(total == 0, 1, total)


def _along_sides(images: Tensor, matrix: Callable[[int], Tensor]) -> Tensor:
    """`matrix(side)` (n, side, side) along both sides."""
    height, width = images.shape[2:]
    rows = matrix(height)
    return _separable(images, rows, rows if width == height else matrix(width))


def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A matrix of each picture's own along each side.

    Products rather than gathers: their gradients are products too, the same from run to run on a GPU, and
    they cost nothing beside an autoencoder.
    """
    rows, columns = rows.to(images.dtype), columns.to(images.dtype)
    return rows[:, None] @ images @ columns[:, None].mT


def _between(interval: tuple[float, float], share: Tensor) -> Tensor:
    low, high = interval
    return low + (high - low) * share


def _check_interval(name: str, interval: tuple[float, float], most: float) -> None:
    if not isinstance(interval, tuple | list) or len(interval) != 2:
        raise TypeError(f"{name}: got {interval!r}, expected (lowest, highest)")
    low, high = interval
    if not 0 < low <= high <= most or math.isinf(high):
        limit = "" if math.isinf(most) else f" and at most {most}"
        raise ValueError(f"{name}: got ({low}, {high}), expected an ordered pair above 0{limit}")
