"""Pictures in [0, 1] on a walk through a denoiser of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor
from tqdm.auto import tqdm

from pumice.models import PixelDenoiser, frozen

from .sampler import Sampler
from .walk import Walk


class PixelSampler:
    """A `Sampler` of a denoiser of pixels, from [0, 1] to [0, 1], with a bar.

    Args:
        model: the denoiser.
        parts: of how many rows each picture is made.
        rounds: walks that are to be taken, for the bar.
        seed, batch_size, progress: `Options`.
    """

    def __init__(
        self,
        model: PixelDenoiser,
        parts: Sequence[int],
        *,
        rounds: int = 1,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> None:
        self._model, self._rounds, self._round = model, rounds, 0
        self._sampler = Sampler(model, parts, model.device, seed=seed, batch_size=batch_size)
        self._bar = tqdm(total=rounds * sum(parts), unit="row", disable=not progress)

    def __call__(self, rows: Sequence[Tensor], walk: Walk) -> list[Tensor]:
        """Rows (3, h, w) in [0, 1], purified; the next call has random numbers of its own."""
        with ExitStack() as last, frozen([self._model.unet]):
            last.callback(self._bar.close)
            walked = self._sampler(
                [row * 2 - 1 for row in rows], walk, round=self._round, tick=self._bar.update
            )
            self._round += 1
            if self._round < self._rounds:
                last.pop_all()
        return [(row / 2 + 0.5).clamp(0, 1) for row in walked]
