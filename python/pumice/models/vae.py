"""Pictures to latents and back, with gradient: scaling, shifting, and the precision it needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .errors import UnsupportedModelError


def encode(vae: Any, images: Tensor, *, upcast: bool) -> Any:
    """The posterior of `images` (B, 3, H, W) in [0, 1]; what is drawn from it still has to be normalized."""
    return _run(vae, "encode", images * 2 - 1, upcast).latent_dist


def decode(vae: Any, latents: Tensor, *, upcast: bool) -> Tensor:
    """The pictures of `latents`, unclamped, (B, 3, H, W) in about [0, 1]."""
    shift, scale = _shift_scale(vae, latents)
    images: Tensor = _run(vae, "decode", latents / scale + shift, upcast).sample
    return images / 2 + 0.5


def normalize(vae: Any, z: Tensor) -> Tensor:
    """Latents as the denoiser sees them, (z - shift) * scale."""
    shift, scale = _shift_scale(vae, z)
    return (z - shift) * scale


def _shift_scale(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:  # one a channel
        shift, std = (like.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return shift, config.scaling_factor / std
    return config.get("shift_factor") or 0.0, config.scaling_factor


class _Method(nn.Module):
    """A method of a module as a module of its own, which `functional_call` asks for."""

    def __init__(self, vae: nn.Module, name: str) -> None:
        super().__init__()
        self.vae, self.name = vae, name

    def forward(self, x: Tensor) -> Any:
        return getattr(self.vae, self.name)(x)


def _run(vae: Any, name: str, x: Tensor, upcast: bool) -> Any:
    if not upcast or vae.dtype != torch.float16:
        return getattr(vae, name)(x.to(vae.dtype))
    if hasattr(vae, "_hf_hook") or getattr(vae, "is_gradient_checkpointing", False):
        raise UnsupportedModelError(
            "vae: it overflows in float16 and cannot be upcast with offloading or gradient checkpointing; "
            "call pipe.vae.to(torch.float32) first"
        )
    # float32 copies of the weights for this call and its backward; the caller's stay float16
    weights = {f"vae.{key}": weight.float() for key, weight in vae.named_parameters()}
    return functional_call(_Method(vae, name), weights, (x.float(),))
