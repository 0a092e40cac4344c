"""What methods of every folder take, checked in one place."""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .model import DiffusionModel
from .prompts import PromptEmbeds

_SEEDS = "a whole number, or a list of them"


def check_number(name: str, value: float) -> None:
    """Of Python or NumPy, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got a {type(value).__name__}, expected a number")


def check_budget(name: str, value: float) -> None:
    """A budget or step in the unit of the pictures."""
    check_number(name, value)
    if not 0 <= value <= 1:
        hint = f", in the unit of the pictures: {value:g}/255?" if 1 < value <= 255 else ""
        raise ValueError(f"{name}: got {value}, expected 0 to 1{hint}")


def checked_count(name: str, value: int, *, least: int = 1) -> int:
    value = _whole(name, value, "a whole number")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
    return value


def check_scale(name: str, value: float, *, positive: bool = False) -> None:
    """A finite number that is not negative."""
    check_number(name, value)
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number larger than any float
        finite = False
    if not finite or value < 0 or (positive and value == 0):
        expected = "positive" if positive else "not negative"
        raise ValueError(f"{name}: got {value}, expected a finite number that is {expected}")


def checked_seeds(seed: int | Sequence[int], pictures: int) -> list[int]:
    """One for each picture: `seed`, `seed` + 1, ... or those of a list."""
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        seeds = [_whole("seed", each, _SEEDS) for each in seed]
        if len(seeds) != pictures:
            raise ValueError(f"seed: got {len(seeds)}, expected one, or one for each of {pictures} pictures")
        return seeds
    first = first_seed(seed)
    return [first + picture for picture in range(pictures)]


def first_seed(seed: int | Sequence[int]) -> int:
    """That of all which pictures of a subject have in common."""
    return _whole("seed", seed[0] if isinstance(seed, Sequence) and len(seed) else seed, _SEEDS)


def _whole(name: str, value: Any, expected: str) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: got a {type(value).__name__}, expected {expected}")


def check_prompt(name: str, prompt: str) -> None:
    if not isinstance(prompt, str):
        raise TypeError(f"{name}: got a {type(prompt).__name__}, expected a string")


def checked_prompt(model: DiffusionModel, prompt: str, name: str = "prompt") -> PromptEmbeds:
    """The one prompt that all pictures go with, encoded once."""
    check_prompt(name, prompt)
    with model.frozen(), torch.no_grad():
        return model.encode_prompt(prompt)


def check_images(name: str, images: Tensor) -> None:
    """(B, 3, H, W) floating, in [0, 1]."""
    if not images.is_floating_point():
        raise TypeError(f"{name}: got {images.dtype}, expected a floating tensor in [0, 1]")
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"{name}: got shape {tuple(images.shape)}, expected (B, 3, H, W) with B, H, W > 0")
    low, high = images.aminmax()  # one pass; both are NaN where one value is
    if not bool((low >= 0) & (high <= 1)):
        found = "NaN" if bool(low.isnan()) else f"{low:.3g} to {high:.3g}"
        raise ValueError(f"{name}: got {found}, expected values in [0, 1]")


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called pumice."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("pumice", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
