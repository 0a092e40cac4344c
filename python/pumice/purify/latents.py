"""Pictures in [0, 1] on a walk through the latents of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice.models import DiffusionModel

from .batches import in_batches
from .sampler import Denoise, Sampler
from .walk import Walk


class LatentSampler:
    """A `Sampler` in latents, from pictures in [0, 1] to pictures in [0, 1], with a bar.

    Args:
        model: whose latents they are.
        denoise: its network.
        count: of pictures.
        seed, batch_size, progress: `Options`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        denoise: Denoise,
        count: int,
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> None:
        self._model = model
        self._sampler = Sampler(denoise, [1] * count, model.device, seed=seed, batch_size=batch_size)
        self._bar = tqdm(total=count, unit="picture", disable=not progress)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor], walk: Walk) -> list[Tensor]:
        """Pictures (3, h, w), purified; they are encoded to a sample of their posterior."""
        with self._model.frozen(), self._bar as bar:
            latents = in_batches(pictures, self._sampler.budget, self._encoded)
            walked = self._sampler(latents, walk, tick=bar.update)
            return in_batches(walked, self._sampler.budget, lambda _, z: self._model.decode_latents(z))

    def _encoded(self, numbers: Sequence[int], images: Tensor) -> Tensor:
        shape = self._model.latent_shape(*images.shape[2:])
        return self._model.encode_image(
            images.to(self._model.device), noise=self._sampler.draws.normal(numbers, "posterior", 0, shape)
        )
