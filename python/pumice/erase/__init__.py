"""Floor 3: take concepts out of a model, in closed form, and keep the rest."""

from __future__ import annotations

from .arguments import ErasureWarning
from .debias import debias
from .mace import mace_fuse, mace_refine
from .preserve import Preserve
from .rece import rece
from .speed import speed
from .time import time
from .trce import trce
from .uce import uce, uce_sweep

__all__ = [
    "ErasureWarning",
    "Preserve",
    "debias",
    "mace_fuse",
    "mace_refine",
    "rece",
    "speed",
    "time",
    "trce",
    "uce",
    "uce_sweep",
]
