"""Floor 4: a small, trained text-to-image pipeline and its drawn world; tiny random ones of every family."""

from __future__ import annotations

from . import world
from .shipped import WEIGHTS, calibration, fresh_prompts, load, load_clip, load_reader
from .similarity import REPLAYED, similarity
from .tiny import tiny_pipeline

__all__ = [
    "REPLAYED",
    "WEIGHTS",
    "calibration",
    "fresh_prompts",
    "load",
    "load_clip",
    "load_reader",
    "similarity",
    "tiny_pipeline",
    "world",
]
