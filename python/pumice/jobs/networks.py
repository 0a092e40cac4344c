"""What methods work by: one loader a kind, and what tells one model from another."""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pumice import models
from pumice.models import DiffusionModel, PixelDenoiser
from pumice.models.deep_floyd import is_deep_floyd, open_deep_floyd
from pumice.models.fingerprint import digest
from pumice.models.upscaler import load_upscaler

Kind = Literal["pipe", "denoiser", "upscaler"]
"""What methods call the argument: a text-to-image pipeline, a denoiser of pixels, an upscaler."""


def load(kind: Kind, source: Any, **place: Any) -> Any:
    """A model, loaded once for all pictures; `dtype` and `device` are for a path."""
    if kind == "pipe":
        return models.load(source, **place)
    if kind == "upscaler":
        return load_upscaler(source, **place)
    if not is_deep_floyd(source):
        return models.load_denoiser(source, **place)
    return open_deep_floyd(Path(source)).to(**place) if isinstance(source, str | PathLike) else source


def device(model: Any) -> torch.device:
    return torch.device(model.device)


def told(*found: Any) -> str:
    """Another text for models of other weights or another noise schedule."""
    return hashlib.sha256(repr([_state(each) for each in found]).encode()).hexdigest()[:16]


def _state(model: Any) -> Any:
    if isinstance(model, DiffusionModel):
        return (models.fingerprint(model), models.drawing_state(model)["vae"], model.schedule.config)
    if isinstance(model, PixelDenoiser):
        schedule = model.schedule  # whose config also has steps of DDIM, which are taken by none
        levels = schedule.alphas_cumprod.tolist()
        return (digest(model.unet), model.variance, model.size, schedule.prediction_type, levels)
    parts = model.components.values()
    configs = [
        {name: value for name, value in part.config.items() if not name.startswith("_")}
        for part in parts
        if hasattr(part, "config") and not isinstance(part, nn.Module)
    ]
    return (digest(*(part for part in parts if isinstance(part, nn.Module))), configs)
