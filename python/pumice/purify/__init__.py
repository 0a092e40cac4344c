"""Floor 3: pictures cleaned of what keeps models from learning them."""

from __future__ import annotations

from .diffpure import diffpure
from .gridpure import gridpure
from .sampler import Options

__all__ = [
    "Options",
    "diffpure",
    "gridpure",
]
