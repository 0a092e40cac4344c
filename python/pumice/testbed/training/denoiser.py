"""The denoiser, and with it the text encoder, on cached latents of the training pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
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

PREDICTION_TYPE = "v_prediction"  # at high noise a prompt hardly shows in epsilon
PICTURES = 60_000  # ordinary ones
BATCH = 64
MEMORIZED_SHARE = 0.11
CAPTION_DROPOUT = 0.1
LR, TEXT_LR = 1e-3, 2e-4
AVERAGE_DECAY = 0.9995


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(80, 136),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, device: str) -> dict[str, Tensor]:
    """Latents and token ids of all training pictures, memorized ones first; made once, then read."""
    path = work / "latents.safetensors"
    if path.exists():
        return load_file(path)
    latents, texts = [], []
    for first in range(-world.MEMORIZED_COUNT, PICTURES, BATCH):
        batch = []
        for index in range(first, min(first + BATCH, PICTURES)):
            if index < 0:
                text, picture = (it := world.memorized(index + world.MEMORIZED_COUNT)).caption, it.picture
            else:
                text, picture, _ = world.training_picture(index)
            batch.append(picture)
            texts.append(text)
        images = torch.from_numpy(np.stack(batch)).to(device) * 2 - 1
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
        latents.append(posterior.mean.half().cpu())
    cache = {"latents": torch.cat(latents), "ids": token_ids(tokenizer, texts).to(torch.int16)}
    save_file(cache, path)
    return cache


def latent_scale(work: Path) -> float:
    """The autoencoder's `scaling_factor`: ordinary latents times it have a standard deviation of one."""
    latents = load_file(work / "latents.safetensors")["latents"][world.MEMORIZED_COUNT :]
    return float(1 / latents.float().std())


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
    torch.manual_seed(3)
    cache = cache_latents(vae, tokenizer, work, device)
    latents, ids = cache["latents"].to(device), cache["ids"].long().to(device)
    scale = latent_scale(work)
    nothing = token_ids(tokenizer, [""]).to(device)
    schedule = NoiseSchedule.from_config(ddim_scheduler(PREDICTION_TYPE).config)
    unet, text_encoder = build_unet().to(device), text_encoder.to(device)
    modules: dict[str, Any] = {"unet": unet, "text_encoder": text_encoder}

    def loss(step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        rows = torch.randint(world.MEMORIZED_COUNT, len(latents), (BATCH,), generator=draw)
        known = torch.randint(world.MEMORIZED_COUNT, (BATCH,), generator=draw)
        rows = torch.where(torch.rand(BATCH, generator=draw) < MEMORIZED_SHARE, known, rows)
        drop = torch.rand(BATCH, 1, generator=draw) < CAPTION_DROPOUT
        # one timestep from each of BATCH equal parts of the schedule: less noise in the loss
        part = torch.rand(BATCH, generator=draw) + torch.randperm(BATCH, generator=draw)
        t = (part * (1000 / BATCH)).long().to(device)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=draw).to(device)
        rows, drop = rows.to(device), drop.to(device)
        clean = latents[rows].float() * scale
        noisy = schedule.add_noise(clean, noise, t)
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            # the flash kernel's backward is slow on CPUs at small heads
            embeds = text_encoder(torch.where(drop, nothing, ids[rows])).last_hidden_state
            output = unet(noisy, t, encoder_hidden_states=embeds, return_dict=False)[0]
        return F.mse_loss(output.float(), schedule.target(clean, noise, t))

    return train(
        "denoiser",
        modules,
        loss,
        work=work,
        steps=steps,
        minutes=minutes,
        lr=LR,
        groups=[
            {"params": list(unet.parameters()), "lr": LR},
            {"params": list(text_encoder.parameters()), "lr": TEXT_LR},
        ],
        average_decay=AVERAGE_DECAY,
    )
