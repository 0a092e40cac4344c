"""Floor 3: pictures cleaned of what keeps models from learning them."""

from __future__ import annotations

from . import filters
from .codesr import codesr
from .ddspure import ddspure
from .diffpure import diffpure
from .gridpure import gridpure
from .impress import impress, laplacian_pyramid
from .latent_diffpure import QUALITY_PROMPT, latent_diffpure
from .noisy_upscaling import noisy_upscaling
from .pdm_pure import pdm_pure
from .sampler import Options

__all__ = [
    "QUALITY_PROMPT",
    "Options",
    "codesr",
    "ddspure",
    "diffpure",
    "filters",
    "gridpure",
    "impress",
    "laplacian_pyramid",
    "latent_diffpure",
    "noisy_upscaling",
    "pdm_pure",
]
