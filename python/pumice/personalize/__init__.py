"""Floor 3: models that learn a subject from a few pictures, and not the noise in them."""

from __future__ import annotations

from .arguments import PersonalizationWarning
from .decoupling import NEGATIVE_PROMPT, NOISE_PHRASE
from .dreambooth import dreambooth
from .result import Personalized
from .sample import sample
from .textual_inversion import textual_inversion

__all__ = [
    "NEGATIVE_PROMPT",
    "NOISE_PHRASE",
    "PersonalizationWarning",
    "Personalized",
    "dreambooth",
    "sample",
    "textual_inversion",
]
