"""Floor 2: diffusion models of every family behind one interface."""

from __future__ import annotations

from .attention import CrossAttentionLayer
from .errors import UnsupportedModelError
from .loading import load
from .model import DiffusionModel
from .prompts import PromptEmbeds, PromptTokens, Word
from .schedule import NoiseSchedule

__all__ = [
    "CrossAttentionLayer",
    "DiffusionModel",
    "NoiseSchedule",
    "PromptEmbeds",
    "PromptTokens",
    "UnsupportedModelError",
    "Word",
    "load",
]
