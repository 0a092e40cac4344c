"""Which weights a result belongs to."""

from __future__ import annotations

import hashlib

import torch

from .model import DiffusionModel


def fingerprint(model: DiffusionModel) -> str:
    """SHA-256 of the weights of denoiser and text encoders, with their names, shapes and dtypes, in hex.

    The same on every device; another one after any edit, with an adapter attached, and in another dtype.
    """
    digest = hashlib.sha256()
    for part in (model.unet, *model.text_encoders):
        part = getattr(part, "_orig_mod", part)  # torch.compile wraps it, and would change the names
        for name, weight in part.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
