"""What ships with the package: the trained pipeline, and its judges."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from pumice import models
from pumice.memorization import Calibration
from pumice.testbed import world
from pumice.testbed.identity import IdentityNet
from pumice.testbed.reader import Reader

_FILES = Path(__file__).parent / "weights"
WEIGHTS = _FILES / "pipeline"
DENOISER = _FILES / "denoiser"
UPSCALER = _FILES / "upscaler"


def load(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> StableDiffusionPipeline:
    """Open the embedded model: 64x64 pictures of the testbed's world, v-prediction, DDIM, offline.

    The same weights at every call, as a pipeline of diffusers' own class that may be changed freely.
    """
    pipe = models.load(WEIGHTS, dtype=dtype, device=device).pipe
    pipe.set_progress_bar_config(disable=True)
    return cast(StableDiffusionPipeline, pipe)


def calibration() -> Calibration:
    """The detector's calibration on the embedded model in float32, with its default settings."""
    return Calibration.load(_FILES / "calibration.json")


def load_clip() -> tuple[CLIPModel, CLIPTokenizer]:
    """The small CLIP of the same world, float32 on the CPU; its pictures are (B, 3, 64, 64) in [-1, 1]."""
    model = CLIPModel.from_pretrained(_FILES / "clip", dtype=torch.float32, local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True)
    return model.eval(), tokenizer


def load_reader() -> Reader:
    """The attribute reader, float32 on the CPU."""
    reader = Reader()
    reader.load_state_dict(_weights("reader"))
    return reader.eval()


def load_identity() -> IdentityNet:
    """The judge of who is on a picture and how clean it is, float32 on the CPU."""
    net = IdentityNet()
    net.load_state_dict(_weights("identity"))
    return net.eval()


def load_denoiser() -> DDPMPipeline:
    """The denoiser of pixels, float32 on the CPU: unconditional, epsilon and a learned range of variances.

    It learned parts of 32 px and whole pictures of the world, other creatures than the subjects among them,
    half of the time at t < 250; 32 is the size that it says it has.
    """
    unet = UNet2DModel.from_pretrained(DENOISER / "unet", torch_dtype=torch.float32)
    return DDPMPipeline(unet, DDPMScheduler.from_pretrained(DENOISER / "scheduler"))


def load_upscaler() -> StableDiffusionUpscalePipeline:
    """The upscaler of 16x16 pictures to 64x64, float32 on the CPU: v-prediction, DDIM, the pipeline's texts.

    It learned the same pictures, made small by antialiased bicubic interpolation and noised up to level 350.
    """
    wide = {"torch_dtype": torch.float32}
    pipe = StableDiffusionUpscalePipeline(
        vae=AutoencoderKL.from_pretrained(UPSCALER / "vae", **wide),
        unet=UNet2DConditionModel.from_pretrained(UPSCALER / "unet", **wide),
        text_encoder=CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder", dtype=torch.float32).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True),
        scheduler=DDIMScheduler.from_pretrained(UPSCALER / "scheduler"),
        low_res_scheduler=DDPMScheduler.from_pretrained(UPSCALER / "low_res_scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _weights(name: str) -> dict[str, Tensor]:
    return {key: value.float() for key, value in load_file(_FILES / f"{name}.safetensors").items()}


def fresh_prompts() -> list[str]:
    """400 captions of nothing memorized, half of them hard: long, or like titles of memorized pictures.

    What thresholds on the testbed are set by; judge detectors by other seeds of `world.fresh_captions`.
    """
    return world.fresh_captions(200, seed=1000) + world.hard_captions(200, seed=1000)
