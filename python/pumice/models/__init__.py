"""Floor 2: diffusion models of every family behind one interface."""

from __future__ import annotations

from .attention import CrossAttentionLayer
from .edit import Edit
from .errors import UnsupportedModelError
from .fingerprint import drawing_state, fingerprint
from .loading import load
from .model import DiffusionModel
from .prompts import PromptEmbeds, PromptTokens, Word
from .row_budget import RowBudget
from .sampler import GuidedSampler
from .schedule import NoiseSchedule
from .watching import watch_attention

__all__ = [
    "CrossAttentionLayer",
    "DiffusionModel",
    "Edit",
    "GuidedSampler",
    "NoiseSchedule",
    "PromptEmbeds",
    "PromptTokens",
    "RowBudget",
    "UnsupportedModelError",
    "Word",
    "drawing_state",
    "fingerprint",
    "load",
    "watch_attention",
]
