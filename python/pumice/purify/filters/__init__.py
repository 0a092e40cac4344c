"""Filters that need no model: what anyone may do to a picture, on purpose or by saving it."""

from __future__ import annotations

from .applying import compose
from .codec import bit_depth, compress_and_resize, jpeg
from .guided import adverse_cleaner, guided
from .resizing import resize
from .smoothing import bilateral, gaussian, median, total_variation
from .tvm import tvm

__all__ = [
    "adverse_cleaner",
    "bilateral",
    "bit_depth",
    "compose",
    "compress_and_resize",
    "gaussian",
    "guided",
    "jpeg",
    "median",
    "resize",
    "total_variation",
    "tvm",
]
