"""Train the testbed part by part: `python -m pumice.testbed.training all`, again after every interruption."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from transformers import CLIPTextModel

from pumice.testbed.identity import IdentityNet
from pumice.testbed.reader import Reader
from pumice.testbed.shipped import load
from pumice.testbed.tiny import ddim_scheduler
from pumice.testbed.training import (
    denoiser,
    export,
    identity,
    pixel_denoiser,
    reader,
    text,
    upscaler,
    vae,
)
from pumice.testbed.training.loop import restore

# What the shipped weights were made with.
STEPS = {
    "vae": 4400,
    "clip": 2700,
    "reader": 1500,
    "denoiser": 10_000,
    "identity": 1600,
    "pixel_denoiser": 3200,
    "upscaler_vae": 1800,
    "upscaler": 3000,
}


def _load(module: nn.Module, work: Path, name: str, key: str) -> Any:
    """A finished part, frozen, with averaged weights where there are some."""
    restore(module, work / f"{name}.pt", key)
    return module.eval().requires_grad_(False)


def _text_encoder(work: Path) -> CLIPTextModel:
    """A text encoder that starts where CLIP's has arrived."""
    tokenizer = text.tokenizer_of(work)
    clip = _load(text.build_clip(tokenizer), work, "clip", "clip")
    encoder = CLIPTextModel(text.text_config(tokenizer))
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder


def _fit_denoiser(work: Path, **limits: Any) -> bool:
    autoencoder = _load(vae.build(), work, "vae", "vae").to(limits["device"])
    return denoiser.fit(autoencoder, text.tokenizer_of(work), _text_encoder(work), work, **limits)


def _fit_upscaler(work: Path, **limits: Any) -> bool:
    pipe = load()
    autoencoder = _load(upscaler.build_vae(), work, "upscaler_vae", "vae").to(limits["device"])
    encoder = pipe.text_encoder.requires_grad_(False).to(limits["device"])
    return upscaler.fit(autoencoder, pipe.tokenizer, encoder, work, **limits)


PARTS: dict[str, Callable[..., bool]] = {
    "vae": vae.fit,
    "clip": text.fit,
    "reader": reader.fit,
    "denoiser": _fit_denoiser,
}


@click.command()
@click.argument("part", type=click.Choice(["all", *STEPS, "export", "calibration"]))
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(".cache/testbed"),
    help="Checkpoints and cached latents.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), help="Steps of the part; by default those of the shipped weights."
)
@click.option(
    "--minutes", type=float, default=1e9, help="Stop after so long; the next call goes on from there."
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parents[1] / "weights",
    help="For export, calibration, and the parts that are exported at once.",
)
def main(part: str, work: Path, steps: int | None, minutes: float, device: str, out: Path) -> None:
    """Train PART of the testbed, or all; those behind `denoiser` start from the exported pipeline."""
    if steps and part not in STEPS:
        raise click.UsageError("--steps: is of one part, expected one of " + ", ".join(STEPS))
    began = time.monotonic()

    def finish(name: str, fit: Callable[..., bool]) -> None:
        left = minutes - (time.monotonic() - began) / 60
        if not fit(work, steps=steps or STEPS[name], minutes=left, device=device):
            raise SystemExit(f"{name}: stopped after {minutes:g} minutes; call again to go on")

    for name, fit in PARTS.items():
        if part in ("all", name):
            finish(name, fit)
    if part in ("all", "export"):
        export.save(
            out,
            tokenizer=text.tokenizer_of(work),
            vae=_load(vae.build(), work, "vae", "vae"),
            scale=denoiser.latent_scale(work),
            unet=_load(denoiser.build_unet(), work, "denoiser", "unet"),
            text_encoder=_load(
                CLIPTextModel(text.text_config(text.tokenizer_of(work))), work, "denoiser", "text_encoder"
            ),
            scheduler=ddim_scheduler(denoiser.PREDICTION_TYPE),
            clip=_load(text.build_clip(text.tokenizer_of(work)), work, "clip", "clip"),
            reader=_load(Reader(), work, "reader", "reader"),
        )
    if part in ("all", "identity"):
        finish("identity", partial(identity.fit, out / "pipeline"))
        export.save_identity(out, _load(IdentityNet(), work, "identity", "identity"))
    if part in ("all", "pixel_denoiser"):
        finish("pixel_denoiser", partial(pixel_denoiser.fit, work))
        unet = _load(pixel_denoiser.build(), work, "pixel_denoiser", "unet")
        export.save_denoiser(out, unet, pixel_denoiser.scheduler())
    if part in ("all", "upscaler_vae"):
        finish("upscaler_vae", partial(upscaler.fit_vae, work))
    if part in ("all", "upscaler"):
        finish("upscaler", partial(_fit_upscaler, work))
        autoencoder = _load(upscaler.build_vae(), work, "upscaler_vae", "vae")
        export.save_upscaler(
            out,
            vae=autoencoder,
            scale=upscaler.latents(autoencoder, work, "cpu")[1],
            unet=_load(upscaler.build_unet(), work, "upscaler", "unet"),
            scheduler=ddim_scheduler(upscaler.PREDICTION_TYPE),
            low_res_scheduler=upscaler.low_res_scheduler(),
        )
    if part in ("all", "export", "calibration"):
        export.calibrate(out)


if __name__ == "__main__":
    main()
