"""The attribute reader, trained on drawn pictures, blurred and noisy ones among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pumice.testbed import world
from pumice.testbed.reader import Reader, targets
from pumice.testbed.training.loop import train

BATCH = 64


def _batch(step: int) -> tuple[Tensor, list[world.Scene]]:
    rng = np.random.default_rng((22, step))
    scenes = [world.random_scene(rng) for _ in range(BATCH)]
    images = torch.from_numpy(np.stack([world.draw(scene, rng) for scene in scenes]))
    noise = torch.Generator().manual_seed(step)
    soft = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    share = torch.rand(BATCH, 1, 1, 1, generator=noise) * (torch.rand(BATCH, 1, 1, 1, generator=noise) < 0.6)
    images = images.lerp(soft, share)
    level = 0.08 * torch.rand(BATCH, 1, 1, 1, generator=noise)
    return (images + level * torch.randn(images.shape, generator=noise)).clamp(0, 1), scenes


def fit(work: Path, *, steps: int, minutes: float, device: str) -> bool:
    torch.manual_seed(2)
    reader = Reader().to(device)

    def loss(step: int) -> Tensor:
        images, scenes = _batch(step)
        with torch.autocast(device, torch.bfloat16):
            logits = reader(images.to(device))
        wanted = targets(scenes)
        return torch.stack(
            [F.cross_entropy(logits[name].float(), wanted[name].to(device)) for name in wanted]
        ).sum()

    return train("reader", {"reader": reader}, loss, work=work, steps=steps, minutes=minutes, lr=2e-3)
