"""The denoiser of pixels that purification works by: unconditional, on parts of pictures and whole ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pumice.testbed import world
from pumice.testbed.training.loop import train

PICTURES = 16_000
CREATURE_SHARE = 0.3  # the prior of photographs has seen people, too: these are not the subjects
SIDE = 32  # px of the parts
PARTS, WHOLES = 32, 8  # in a batch; every fourth is of whole pictures
SMALL_TIMESTEPS = 250  # half of all come from below: purification stays there
LR, AVERAGE_DECAY = 1e-3, 0.999


def build() -> UNet2DModel:
    """As the denoisers of guided diffusion (arXiv:2105.05233) are: scale-shift norms, learned variances."""
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(40, 72, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
    )


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(variance_type="learned_range")  # betas linear from 1e-4 to 0.02


@cache
def pictures() -> Tensor:
    """(PICTURES, 3, 64, 64) uint8, ordinary ones and creatures."""
    found = np.empty((PICTURES, 3, world.SIZE, world.SIZE), np.uint8)
    for index in range(PICTURES):
        rng = np.random.default_rng((30, index))
        if rng.random() < CREATURE_SHARE:
            style = str(rng.choice(world.STYLES)) if rng.random() < 0.2 else None
            picture = world.creature(int(rng.integers(10**6)), index, style=style)
        else:
            picture = world.training_picture(int(rng.integers(2**31)))[1]
        found[index] = np.round(picture * 255)
    return torch.from_numpy(found)


def batch(step: int) -> Tensor:
    """Pictures (B, 3, s, s) in [-1, 1] of one training step, half of them mirrored."""
    draw = torch.Generator().manual_seed(step)
    whole = step % 4 == 3
    chosen = pictures()[torch.randint(PICTURES, (WHOLES if whole else PARTS,), generator=draw)]
    if not whole:
        corners = torch.randint(world.SIZE - SIDE + 1, (PARTS, 2), generator=draw).tolist()
        pairs = zip(chosen, corners, strict=True)
        chosen = torch.stack([each[:, y : y + SIDE, x : x + SIDE] for each, (y, x) in pairs])
    mirrored = torch.rand(len(chosen), 1, 1, 1, generator=draw) < 0.5
    return torch.where(mirrored, chosen.flip(3), chosen) / 127.5 - 1


def fit(work: Path, *, steps: int, minutes: float, device: str) -> bool:
    torch.manual_seed(5)
    unet = build().to(device)
    alphas = scheduler().alphas_cumprod.double().to(device)
    before = torch.cat((alphas.new_ones(1), alphas[:-1]))
    betas = 1 - alphas / before
    largest = betas.log()
    smallest = (betas * (1 - before) / (1 - alphas))[1:].log()
    smallest = torch.cat((smallest[:1], smallest))  # the last step has no variance of its own

    def loss(step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        clean = batch(step).to(device)
        noise = torch.randn(clean.shape, generator=draw).to(device)
        most = torch.where(torch.rand(len(clean), generator=draw) < 0.5, SMALL_TIMESTEPS, 1000)
        t = (torch.rand(len(clean), generator=draw) * most).long().to(device)
        alpha, beta, top, low = (
            each[t].float().view(-1, 1, 1, 1) for each in (alphas, betas, largest, smallest)
        )
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            # the flash kernel's backward is slow on CPUs at small heads
            output = unet(noisy, t).sample
        epsilon, share = output.float().chunk(2, dim=1)
        # the variance learns from the step's divergence from the true one, its mean held fixed (2102.09672)
        wrong = (epsilon - noise).detach() * beta / (1 - beta).sqrt() / (1 - alpha).sqrt()
        log_variance = (share + 1) / 2 * (top - low) + low
        ratio = low - log_variance
        divergence = 0.5 * (ratio.exp() - 1 - ratio + wrong.square() * (-log_variance).exp())
        return F.mse_loss(epsilon, noise) + divergence.mean()

    return train(
        "pixel_denoiser",
        {"unet": unet},
        loss,
        work=work,
        steps=steps,
        minutes=minutes,
        lr=LR,
        average_decay=AVERAGE_DECAY,
    )
