"""Random numbers of methods: every picture's own, whatever the batch, the order or the device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Draws:
    """Each number is a function of a picture's seed, the step and what it is for, so nothing has a state.

    A picture alone draws what it draws in a batch, a step that is done again after running out of memory
    draws the same, and CPU and GPU agree: numbers are made on the CPU.

    Args:
        seeds: one for each picture.
        device: where the numbers go.
    """

    def __init__(self, seeds: Sequence[str], device: torch.device) -> None:
        self._seeds, self._device = tuple(seeds), device

    def normal(self, pictures: Sequence[int], what: str, step: int, shape: Sequence[int]) -> Tensor:
        """Standard normal, (len(pictures), *shape) float32."""
        return self._each(pictures, what, step, lambda g: torch.randn(tuple(shape), generator=g))

    def uniform(self, pictures: Sequence[int], what: str, step: int, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), (len(pictures), *shape) float32."""
        return self._each(pictures, what, step, lambda g: torch.rand(tuple(shape), generator=g))

    def integers(self, pictures: Sequence[int], what: str, step: int, high: int) -> Tensor:
        """Uniform in [0, high), (len(pictures),) int64."""
        return self._each(pictures, what, step, lambda g: torch.randint(high, (), generator=g))

    def permutation(self, picture: int, what: str, step: int, count: int) -> Tensor:
        """0, ..., count - 1 in a random order, (count,) int64 on the CPU."""
        return torch.randperm(count, generator=self._generator(picture, what, step))

    def _generator(self, picture: int, what: str, step: int) -> torch.Generator:
        key = hashlib.blake2b(f"{self._seeds[picture]}/{what}/{step}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(key, "little"))

    def _each(
        self, pictures: Sequence[int], what: str, step: int, draw: Callable[[torch.Generator], Tensor]
    ) -> Tensor:
        stacked = torch.stack([draw(self._generator(picture, what, step)) for picture in pictures])
        if self._device.type == "cuda":
            stacked = stacked.pin_memory()
        return stacked.to(self._device, non_blocking=True)
