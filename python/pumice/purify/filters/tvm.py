"""Total variance minimization (Guo et al., ICLR 2018): some values are dropped, and guessed from the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from pumice.models.arguments import check_number, check_scale, checked_count, checked_seeds
from pumice.models.draws import Draws
from pumice.purify.pictures import Pictures, resized

_TOGETHER = 16  # pictures: more would leave the cache
_RELAXATION = 1.6


def tvm(
    images: Any,
    lamb: float = 0.01,
    drop_rate: float = 0.02,
    *,
    size: int | None = 64,
    variant: Literal["guo", "ds"] = "guo",
    iterations: int = 300,
    seed: int | Sequence[int] = 0,
) -> Any:
    """Rebuild pictures from some of their values, with few and short edges.

    ::

        argmin_z |M (z - x)|_2 + lamb sum_k TV(z_k)
        TV(z) = sum_i |z_(i,:) - z_(i-1,:)|_2 + sum_j |z_(:,j) - z_(:,j-1)|_2

    M keeps each value with probability 1 - drop_rate; the first norm, which is not squared, is that of all
    values of a picture, those of TV are of whole rows and columns of a channel k (Guo et al.,
    arXiv:1711.00117).
    Solved by ADMM (Boyd et al., 2011), over-relaxed, whose linear system is diagonal after a cosine
    transform, to about 1e-4 of the objective.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        lamb: at least 0. While lamb sqrt(8 n) <= 1 for n differences of rows and columns (0.018 at 64 x 64),
            the values that are kept do not move, and only those that were dropped are new.
        drop_rate: 0 up to, not including, 1. Defaults 0.01 and 0.02, of the published evaluation of
            protections (DiffShortcut, arXiv:2406.18944); Guo et al. take 0.03 and 0.5.
        size: pictures are worked on at size x size and come back to their own, bicubic both ways. Default
            64, of that evaluation, which leaves them so small; None, as Guo et al., takes them as they are.
        variant: "ds" is that evaluation's own objective: columns of all channels are next to each other, so
            that channels of a pixel are pulled together, and rows are of all three.
        iterations: of the solver. Default 300.
        seed: of picture 0, one more for each further picture; or a list with one for each.

    Returns:
        The pictures, in the form in which they came; no gradient flows through.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    check_scale("lamb", lamb)
    check_number("drop_rate", drop_rate)
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate: got {drop_rate}, expected 0 up to, not including, 1")
    if variant not in ("guo", "ds"):
        raise ValueError(f"variant: got {variant!r}, expected 'guo' or 'ds'")
    iterations = checked_count("iterations", iterations)
    pictures = Pictures(images)
    seeds = checked_seeds(seed, len(pictures))
    rows = pictures.given
    if size is not None:
        side = checked_count("size", size)
        rows = [resized(row, (side, side)) for row in rows]
    draws = Draws([str(each) for each in seeds], rows[0].device)
    found: dict[int, Tensor] = {}
    for numbers in _of_one_shape(rows):
        x = torch.stack([rows[number] for number in numbers])
        kept = draws.uniform(numbers, "dropped", 0, x.shape[1:]) >= drop_rate
        found |= dict(zip(numbers, solve(x, kept, lamb, iterations, joined=variant == "ds"), strict=True))
    return pictures.finish(
        [resized(found[number], (was.shape[1], was.shape[2])) for number, was in enumerate(pictures.given)]
    )


def solve(x: Tensor, kept: Tensor, lamb: float, iterations: int, *, joined: bool = False) -> Tensor:
    """The minimum of `tvm`'s objective.

    ADMM with w = z, v and h the differences of rows and columns of z, and rho = sqrt(lamb), which was best
    for lamb from 0.003 to 0.3 in pictures.

    Args:
        x: (B, C, H, W).
        kept: (B, C, H, W) bool.
        joined: columns of all channels are next to each other.

    Returns:
        w, (B, C, H, W), typed as x.
    """
    if lamb == 0:
        return x
    if joined:  # (B, 1, H, W C)
        x, kept = (each.permute(0, 2, 3, 1).flatten(2)[:, None] for each in (x, kept))
    rho = math.sqrt(lamb)
    rows, columns = (_cosines(side, x) for side in x.shape[2:])
    shrinking = 1 / (1 + _eigenvalues(rows)[:, None] + _eigenvalues(columns))
    w, (v, h) = x, _differences(x)
    of_w, of_v, of_h = torch.zeros_like(w), torch.zeros_like(v), torch.zeros_like(h)
    for _ in range(iterations):
        right = w - of_w + _adjoint(v - of_v, h - of_h)
        z = rows.T @ ((rows @ right @ columns.T) * shrinking) @ columns
        down, across = _differences(z)
        of_w = of_w + torch.lerp(w, z, _RELAXATION)
        of_v = of_v + torch.lerp(v, down, _RELAXATION)
        of_h = of_h + torch.lerp(h, across, _RELAXATION)
        w = of_w - kept * _clipped(kept * (of_w - x), 1 / rho, (1, 2, 3))
        v = of_v - _clipped(of_v, lamb / rho, (3,))
        h = of_h - _clipped(of_h, lamb / rho, (2,))
        of_w, of_v, of_h = of_w - w, of_v - v, of_h - h
    return w[:, 0].unflatten(2, (-1, 3)).permute(0, 3, 1, 2) if joined else w


def _clipped(x: Tensor, length: float, dim: tuple[int, ...]) -> Tensor:
    """No longer than `length`: what shrinking by that takes away."""
    return x * (length / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp(min=length))


def _differences(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.diff(dim=2), z.diff(dim=3)


def _adjoint(down: Tensor, across: Tensor) -> Tensor:
    return pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1)) + pad(across, (1, 0)) - pad(across, (0, 1))


def _cosines(side: int, like: Tensor) -> Tensor:
    """The orthonormal cosine transform, of which differences are diagonal."""
    index = torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(torch.pi / side * (index + 0.5) * index[:, None]) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like)


def _eigenvalues(cosines: Tensor) -> Tensor:
    """Of the differences' adjoint times differences."""
    side = len(cosines)
    return 2 - 2 * torch.cos(torch.pi / side * torch.arange(side, dtype=cosines.dtype, device=cosines.device))


def _of_one_shape(rows: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of rows that are solved together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for number, row in enumerate(rows):
        by_shape.setdefault(row.shape, []).append(number)
    return [
        numbers[start : start + _TOGETHER]
        for numbers in by_shape.values()
        for start in range(0, len(numbers), _TOGETHER)
    ]
