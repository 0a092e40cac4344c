"""What judges return, checked, and its mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_NORMAL_95 = 1.959964  # standard deviations


def checked_scores(name: str, scores: Any, count: int) -> Tensor:
    """(count,) float64 on the CPU, of what the callable `name` returned for so many pictures."""
    scores = torch.as_tensor(scores).detach().double().cpu()
    if scores.shape != (count,) or not bool(scores.isfinite().all()):
        raise ValueError(
            f"{name}: returned shape {tuple(scores.shape)} or values that are not finite, "
            f"expected finite ({count},)"
        )
    return scores


def mean(key: str, values: Tensor) -> dict[str, float | None]:
    """The mean, and its normal 95 % interval, which takes two values."""
    found = float(values.mean()) if len(values) else None
    if found is None or len(values) < 2:
        return {key: found, f"{key}_low": None, f"{key}_high": None}
    half = _NORMAL_95 * float(values.std()) / math.sqrt(len(values))
    return {key: found, f"{key}_low": found - half, f"{key}_high": found + half}
