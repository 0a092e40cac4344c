"""What several functions of this folder take, checked in one place."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from pumice.models import DiffusionModel


def checked_prompts(prompts: str | Sequence[str], name: str = "prompts") -> tuple[str, ...]:
    """At least one prompt, all of them strings."""
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts:
        raise ValueError(f"{name}: got an empty list, expected at least one prompt")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"{name}: got a {type(prompt).__name__}, expected strings")
    return prompts


def checked_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds 0, 1, ... of a number of them, or those of a list."""
    if isinstance(seeds, Sequence) and not isinstance(seeds, str):
        found = tuple(operator.index(seed) for seed in seeds)
    else:
        found = tuple(range(operator.index(seeds)))
    if not found or min(found) < 0:
        raise ValueError(
            f"seeds: got {seeds}, expected a positive number of seeds, or seeds that are not negative"
        )
    if len(set(found)) < len(found):
        raise ValueError(f"seeds: got {seeds}, expected each of them once")
    return found


def checked_steps(steps: int | None, available: int) -> int:
    """How many of a sampler's `available` steps; None is all of them."""
    steps = available if steps is None else operator.index(steps)
    if not 1 <= steps <= available:
        raise ValueError(f"steps: got {steps}, expected 1 to num_inference_steps = {available}, or None")
    return steps


def check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")


def check_first_step(model: DiffusionModel, timestep: int) -> None:
    """At pure noise (zero terminal SNR) epsilon says nothing of the prompt."""
    if model.schedule.alphas_cumprod[timestep] == 0:
        raise ValueError(
            "pipe: its first step is pure noise (zero terminal SNR), where epsilon says nothing of the prompt"
        )
