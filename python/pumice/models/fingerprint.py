"""Which weights a result belongs to."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from .errors import UnsupportedModelError
from .model import DiffusionModel


def fingerprint(model: DiffusionModel) -> str:
    """SHA-256 of the weights of denoiser and text encoders, with their names, shapes and dtypes, in hex.

    The same on every device; another one after any edit, in another dtype, and with adapters attached, which
    of them are on and how strongly.

    Raises:
        UnsupportedModelError: if weights are offloaded to where they cannot be read.
    """
    return digest(model.unet, *model.text_encoders)


def drawing_state(model: DiffusionModel) -> dict[str, Any]:
    """What else decides what the pipeline draws: its own scheduler, and the weights of its autoencoder."""
    scheduler = model.pipe.scheduler
    # what begins with _ tells where the config came from, some of it in no fixed order
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"scheduler": type(scheduler).__name__, **config, "vae": digest(model.vae)}


def _unread(part: Any) -> set[str]:
    """Projections that unfuse_qkv_projections leaves behind, and no forward pass reads."""
    return {
        f"{name}.{fused}"
        for name, module in part.named_modules()
        if not type(getattr(module, "processor", None)).__name__.startswith("Fused")
        for fused in ("to_qkv", "to_kv")
        if hasattr(module, fused)
    }


def digest(*parts: Any) -> str:
    """SHA-256 of the weights of networks; that of one run elsewhere is that of what it was exported from."""
    found = hashlib.sha256()
    for part in parts:
        part = getattr(part, "exported_from", part)
        part = getattr(part, "_orig_mod", part)  # torch.compile wraps it, and would change the names
        unread = _unread(part)
        for name, weight in part.state_dict().items():
            if name.rpartition(".")[0] in unread:
                continue
            if weight.is_meta:
                raise UnsupportedModelError(
                    "pipe: its weights are offloaded (meta device) and cannot be told from others; "
                    "load it without sequential offloading"
                )
            found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for name, layer in part.named_modules():
            if hasattr(layer, "base_layer"):  # an adapter's scale is no weight
                state = (layer.active_adapters, layer.scaling, layer.disable_adapters, layer.merged_adapters)
                found.update(f"{name} {state}".encode())
    return found.hexdigest()
