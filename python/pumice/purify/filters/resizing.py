"""Pictures made smaller and blown up again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pumice.models.arguments import check_scale

from .applying import applied
from .separable import resizing_taps, separable

Mode = Literal["bilinear", "bicubic", "lanczos"]


def resize(images: Any, scale: float = 0.5, *, mode: Mode = "lanczos", back: bool = True) -> Any:
    """Resample pictures to another size, and back.

    Both sides are multiplied by `scale`, rounded to pixels. Kernels are those of Pillow, as wide as the
    coarser of the two grids, so that nothing aliases; values stay floating between the two ways. The
    gradient of a tensor flows through.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        scale: above 0. Default 0.5, of arXiv:2604.23688.
        mode: the kernel, both ways: "bilinear", "bicubic" (a = -0.5) or "lanczos" of 3 lobes, the default,
            of the same paper.
        back: False leaves a tensor at its new size; PIL images and paths must come back to theirs.

    Returns:
        The pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    check_scale("scale", scale, positive=True)
    if mode not in get_args(Mode):
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(get_args(Mode))}")
    if not back and not isinstance(images, Tensor):
        raise ValueError("back: got False for PIL images or paths, expected a tensor of pictures")
    kernel, support = _KERNELS[mode]

    def resampled(x: Tensor, size: Sequence[int]) -> Tensor:
        rows, columns = (
            resizing_taps(side, count, kernel, support) for side, count in zip(x.shape[2:], size, strict=True)
        )
        return separable(x, rows, columns).clamp(0, 1)

    def there_and_back(x: Tensor) -> Tensor:
        small = resampled(x, [max(1, round(side * scale)) for side in x.shape[2:]])
        return resampled(small, x.shape[2:]) if back else small

    return applied(images, there_and_back)


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _bicubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0)


_KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "bilinear": (_bilinear, 1),
    "bicubic": (_bicubic, 2),
    "lanczos": (_lanczos, 3),
}
