"""Trained parts to the files that the package ships: float16 safetensors in diffusers' own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from pumice import memorization
from pumice.testbed import world
from pumice.testbed.shipped import fresh_prompts


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
