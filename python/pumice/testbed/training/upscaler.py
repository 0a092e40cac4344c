"""The upscaler: pictures of four times the sides, by a denoiser of latents that sees the small picture."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from pumice.models import NoiseSchedule
from pumice.testbed import world
from pumice.testbed.tiny import ddim_scheduler
from pumice.testbed.training.loop import train
from pumice.testbed.training.text import WIDTH, token_ids
from pumice.testbed.training.vae import reconstruction_loss

FACTOR = 4
PICTURES = 16_000
CREATURE_SHARE = 0.3  # the upscaler of photographs has seen people, too: these are not the subjects
VAE_BATCH, BATCH = 16, 64
MAX_NOISE_LEVEL = 350  # as of Stable Diffusion's
CAPTION_DROPOUT = 0.1
VAE_LR, LR, AVERAGE_DECAY = 1.5e-3, 1e-3, 0.999
PREDICTION_TYPE = "v_prediction"


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=world.SIZE,
        latent_channels=4,
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=world.SIZE // FACTOR,
        in_channels=4 + 3,
        out_channels=4,
        block_out_channels=(48, 80),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        num_class_embeds=1000,
    )


def low_res_scheduler() -> DDPMScheduler:
    """What the small picture is noised by, as for Stable Diffusion's upscaler."""
    return DDPMScheduler(beta_schedule="scaled_linear")


@cache
def pictures() -> tuple[list[str], Tensor]:
    """Captions, and (PICTURES, 3, 64, 64) uint8: ordinary pictures and creatures."""
    texts, found = [], np.empty((PICTURES, 3, world.SIZE, world.SIZE), np.uint8)
    for index in range(PICTURES):
        rng = np.random.default_rng((31, index))
        if rng.random() < CREATURE_SHARE:
            text, picture = "a photo of a creature", world.creature(int(rng.integers(10**6)), index)
        else:
            text, picture, _ = world.training_picture(int(rng.integers(2**31)))
        texts.append(text)
        found[index] = np.round(picture * 255)
    return texts, torch.from_numpy(found)


def _pictures(rows: Tensor, device: str) -> Tensor:
    return pictures()[1][rows].to(device) / 127.5 - 1


def fit_vae(work: Path, *, steps: int, minutes: float, device: str) -> bool:
    torch.manual_seed(6)
    vae = build_vae().to(device)

    def loss(step: int) -> Tensor:
        rows = torch.randint(PICTURES, (VAE_BATCH,), generator=torch.Generator().manual_seed(step))
        return reconstruction_loss(vae, _pictures(rows, device), step)

    return train("upscaler_vae", {"vae": vae}, loss, work=work, steps=steps, minutes=minutes, lr=VAE_LR)


@torch.no_grad()
def latents(vae: AutoencoderKL, work: Path, device: str) -> tuple[Tensor, float]:
    """Of all pictures (means), and the factor that gives them a standard deviation of one; made once."""
    path = work / "upscaler_latents.safetensors"
    if not path.exists():
        parts = torch.arange(PICTURES).split(64)
        found = torch.cat([vae.encode(_pictures(rows, device)).latent_dist.mean.cpu() for rows in parts])
        save_file({"latents": found}, path)
    found = load_file(path)["latents"].to(device)
    scale = float(1 / found.std())
    return found * scale, scale


def fit(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    work: Path,
    *,
    steps: int,
    minutes: float,
    device: str,
) -> bool:
    """Train the denoiser; `text_encoder` is the shipped pipeline's, and stays as it is."""
    torch.manual_seed(7)
    unet = build_unet().to(device)
    schedule = NoiseSchedule.from_config(ddim_scheduler(PREDICTION_TYPE).config)
    noises = low_res_scheduler().alphas_cumprod.to(device)
    targets, _ = latents(vae, work, device)
    texts = ["", *pictures()[0]]
    with torch.no_grad():
        parts = token_ids(tokenizer, texts).to(device).split(256)
        embeds = torch.cat([text_encoder(ids).last_hidden_state.half() for ids in parts])

    def loss(step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        rows = torch.randint(PICTURES, (BATCH,), generator=draw)
        drop = torch.rand(BATCH, generator=draw) < CAPTION_DROPOUT
        part = torch.rand(BATCH, generator=draw) + torch.randperm(BATCH, generator=draw)
        t = (part * (1000 / BATCH)).long().to(device)
        level = torch.randint(MAX_NOISE_LEVEL + 1, (BATCH,), generator=draw).to(device)
        noise = torch.randn(targets[rows].shape, generator=draw).to(device)
        small = F.interpolate(
            _pictures(rows, device), scale_factor=1 / FACTOR, mode="bicubic", antialias=True
        ).clamp(-1, 1)
        alpha = noises[level].view(-1, 1, 1, 1)
        small = alpha.sqrt() * small + (1 - alpha).sqrt() * torch.randn(small.shape, generator=draw).to(
            device
        )
        texts = embeds[torch.where(drop, 0, rows + 1)].float()
        noisy = schedule.add_noise(targets[rows], noise, t)
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            # the flash kernel's backward is slow on CPUs at small heads
            output = unet(torch.cat((noisy, small), dim=1), t, texts, class_labels=level).sample
        return F.mse_loss(output.float(), schedule.target(targets[rows], noise, t))

    modules: dict[str, Any] = {"unet": unet}
    return train(
        "upscaler",
        modules,
        loss,
        work=work,
        steps=steps,
        minutes=minutes,
        lr=LR,
        average_decay=AVERAGE_DECAY,
    )
