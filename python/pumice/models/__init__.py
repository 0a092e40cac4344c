"""Floor 2: diffusion models of every family behind one interface."""

from __future__ import annotations

from .attention import CrossAttentionLayer
from .changes import Added, Mapped, Shifted, Zeroed
from .edit import Edit, EditWarning, hook_edits
from .errors import UnsupportedModelError
from .fingerprint import drawing_state, fingerprint
from .freezing import frozen
from .loading import load
from .model import DiffusionModel
from .onnx import onnxruntime
from .pixel import Denoised, PixelDenoiser, load_denoiser
from .prompts import PromptEmbeds, PromptTokens, Word
from .row_budget import RowBudget
from .sampler import GuidedSampler
from .schedule import NoiseSchedule
from .upscaler import Upscaler, load_upscaler
from .watching import watch_attention

__all__ = [
    "Added",
    "CrossAttentionLayer",
    "Denoised",
    "DiffusionModel",
    "Edit",
    "EditWarning",
    "GuidedSampler",
    "Mapped",
    "NoiseSchedule",
    "PixelDenoiser",
    "PromptEmbeds",
    "PromptTokens",
    "RowBudget",
    "Shifted",
    "UnsupportedModelError",
    "Upscaler",
    "Word",
    "Zeroed",
    "drawing_state",
    "fingerprint",
    "frozen",
    "hook_edits",
    "load",
    "load_denoiser",
    "load_upscaler",
    "onnxruntime",
    "watch_attention",
]
