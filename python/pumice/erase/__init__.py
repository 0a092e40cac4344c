"""Floor 3: take concepts out of a model, in closed form, and keep the rest."""

from __future__ import annotations

from .arguments import ErasureWarning
from .uce import uce, uce_sweep

__all__ = ["ErasureWarning", "uce", "uce_sweep"]
