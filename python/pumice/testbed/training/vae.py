"""The autoencoder: 64 px pictures to 8x8 latents of 8 channels and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from pumice.testbed import world
from pumice.testbed.training.loop import train

BATCH = 16
KL_WEIGHT = 2e-3  # per latent number, beside a mean absolute error per pixel
EDGE_WEIGHT = 0.5  # of the error of pixel differences: thin rims count for little in the plain error


def build() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=world.SIZE,
        latent_channels=8,
        block_out_channels=(16, 48, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def pictures(step: int, count: int) -> Tensor:
    """A training batch in [-1, 1]: mostly ordinary pictures, and some memorized ones and subjects."""
    rng = np.random.default_rng((20, step))
    batch = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.80:
            batch.append(world.training_picture(int(rng.integers(2**31)))[1])
        elif kind < 0.92:
            batch.append(world.memorized(int(rng.integers(world.MEMORIZED_COUNT))).picture)
        else:
            batch.append(
                world.subject(int(rng.integers(world.SUBJECT_COUNT)), int(rng.integers(1000, 2**31)))
            )
    return torch.from_numpy(np.stack(batch)) * 2 - 1


def reconstruction_loss(vae: AutoencoderKL, target: Tensor, step: int) -> Tensor:
    """How far pictures (B, 3, H, W) in [-1, 1] come back changed, and how far latents are from a normal."""
    noise, kind = torch.Generator().manual_seed(step), target.device.type
    with torch.autocast(kind, torch.bfloat16):
        posterior = vae.encode(target).latent_dist
        drawn = torch.randn(posterior.mean.shape, generator=noise).to(target.device)
        output = vae.decode(posterior.mean + posterior.std * drawn).sample
    output = output.float()
    error = F.l1_loss(output, target)
    edges = F.l1_loss(output.diff(dim=-1), target.diff(dim=-1)) + F.l1_loss(
        output.diff(dim=-2), target.diff(dim=-2)
    )
    return error + EDGE_WEIGHT * edges + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


def fit(work: Path, *, steps: int, minutes: float, device: str) -> bool:
    torch.manual_seed(0)
    vae = build().to(device)

    def loss(step: int) -> Tensor:
        return reconstruction_loss(vae, pictures(step, BATCH).to(device), step)

    return train("vae", {"vae": vae}, loss, work=work, steps=steps, minutes=minutes, lr=1.5e-3)
