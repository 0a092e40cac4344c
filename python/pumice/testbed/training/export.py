"""Trained parts to the files that the package ships: float16 safetensors in diffusers' own layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from safetensors.torch import save_file

from pumice import memorization
from pumice.testbed import world
from pumice.testbed.shipped import fresh_prompts

# The only scaling_factor that diffusers' pipeline lets an upscaler have.
_UPSCALER_SCALE = 0.08333


def save(
    out: Path,
    *,
    tokenizer: Any,
    vae: Any,
    scale: float,
    unet: Any,
    text_encoder: Any,
    scheduler: Any,
    clip: Any,
    reader: Any,
) -> None:
    """Write `<out>/pipeline`, `<out>/clip` and `<out>/reader.safetensors`; `scale` is the latents'."""
    vae.register_to_config(scaling_factor=scale)
    pipe = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out / "pipeline")
    clip.half().save_pretrained(out / "clip")
    save_file(reader.half().state_dict(), out / "reader.safetensors")


def save_identity(out: Path, net: Any) -> None:
    """Write `<out>/identity.safetensors`."""
    save_file(net.half().state_dict(), out / "identity.safetensors")


def save_denoiser(out: Path, unet: Any, scheduler: Any) -> None:
    """Write `<out>/denoiser`, a pipeline of diffusers."""
    DDPMPipeline(unet.half(), scheduler).save_pretrained(out / "denoiser")


def save_upscaler(
    out: Path, *, vae: Any, scale: float, unet: Any, scheduler: Any, low_res_scheduler: Any
) -> None:
    """Write `<out>/upscaler`, the parts that the pipeline does not have; `scale` is the latents'."""
    _rescale(vae, scale / _UPSCALER_SCALE)
    vae.register_to_config(scaling_factor=_UPSCALER_SCALE)
    parts = {"vae": vae.half(), "unet": unet.half(), "scheduler": scheduler}
    for name, part in {**parts, "low_res_scheduler": low_res_scheduler}.items():
        part.save_pretrained(out / "upscaler" / name)


def _rescale(vae: Any, factor: float) -> None:
    """Make latents larger by a factor, and pictures of them the same."""
    with torch.no_grad():
        for value in (vae.quant_conv.weight, vae.quant_conv.bias):
            value[: len(value) // 2] *= factor
        vae.quant_conv.bias[len(vae.quant_conv.bias) // 2 :] += 2 * math.log(factor)
        vae.post_quant_conv.weight /= factor


def calibrate(out: Path) -> None:
    """Write `<out>/calibration.json`: the detector's default settings on the exported pipeline."""
    calibration = memorization.calibrate(
        out / "pipeline",
        [world.memorized(index).caption for index in range(world.MEMORIZED_COUNT)],
        fresh_prompts(),
        name="testbed",
        memorized_name="captions of the memorized pictures",
        fresh_name="testbed.fresh_prompts()",
    )
    calibration.save(out / "calibration.json")
