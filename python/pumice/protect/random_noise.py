"""Noise that knows nothing: what a protection of the same budget has to be better than."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from pumice.models.arguments import check_budget, checked_seeds
from pumice.models.draws import Draws

from .pictures import Pictures


def random_noise(
    images: Any,
    *,
    eps: float,
    kind: Literal["sign", "uniform"] = "sign",
    seed: int | Sequence[int] = 0,
    mask: Any = None,
) -> Any:
    """Change every value of pictures at random, within a budget.

    ::

        x = clamp(x0 + eps * u, 0, 1)       u = -1 or 1, or uniform between them

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths, of any size.
        eps: the largest change of a value.
        kind: "sign", the most noise that the budget has room for, as much as attacks that step along signs
            end with; or "uniform".
        seed: of picture 0, one more for each further picture; or a list with one for each.
        mask: where pictures may change, as of `protect.Options`.

    Returns:
        The pictures with noise, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    check_budget("eps", eps)
    if kind not in ("sign", "uniform"):
        raise ValueError(f"kind: got {kind!r}, expected 'sign' or 'uniform'")
    pictures = Pictures(images, (), size="native", mask=mask)
    names = list(map(str, checked_seeds(seed, pictures.given)))
    draws = Draws(names, pictures.working[0].device)
    noisy = []
    for number, clean in enumerate(pictures.working):
        u = draws.uniform([number], "noise", 0, clean.shape)[0] * 2 - 1
        if kind == "sign":
            u = torch.where(u < 0, -1.0, 1.0)
        noisy.append((clean + eps * u).clamp(0, 1))
    return pictures.finish(noisy, eps)
