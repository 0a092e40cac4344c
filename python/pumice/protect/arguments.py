"""What the methods of this folder take, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from pumice import models
from pumice.models import DiffusionModel, arguments


class ProtectionWarning(UserWarning):
    """Pictures were made, but they may not be what was wanted."""


def checked_models(pipe: Any) -> tuple[DiffusionModel, ...]:
    """One model or several that the same pictures are protected against."""
    pipes = pipe if isinstance(pipe, list | tuple) else [pipe]
    if not pipes:
        raise ValueError("pipe: got an empty list, expected at least one model")
    for each in pipes:
        if not isinstance(each, str | PathLike | DiffusionModel) and not hasattr(each, "components"):
            raise TypeError(
                f"pipe: got a {type(each).__name__}, expected a diffusers pipeline, a path, a hub id, a "
                "DiffusionModel, or a list of them"
            )
    found = tuple(map(models.load, pipes))
    if len({model.device for model in found}) > 1:
        raise ValueError("pipe: the models are on several devices, expected one")
    return found


@torch.no_grad()
def check_autoencoder(model: DiffusionModel, pictures: Sequence[Tensor]) -> None:
    """Make sure of finite latents, one picture of each size; what overflows in float16 runs in float32."""
    for picture in {picture.shape: picture for picture in pictures}.values():
        with model.frozen():
            finite = bool(model.encode_image(picture[None].to(model.device)).isfinite().all())
        if finite:
            continue
        if model.vae.dtype != torch.float16 or model.upcast_vae:
            raise ValueError("pipe: its autoencoder gives latents that are not finite")
        warn("pipe: its autoencoder overflows in float16 and runs in float32")
        model.upcast_vae = True


def warn(message: str) -> None:
    """Warn at the line that called pumice."""
    arguments.warn(message, ProtectionWarning)
