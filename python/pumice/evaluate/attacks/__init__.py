"""Attacks: what an edit erased is looked for under other words, and in the weights."""

from __future__ import annotations

from .attack import Attack
from .inversion import Inversion, concept_inversion
from .p4d import p4d
from .relearning import relearning
from .ring_a_bell import ring_a_bell
from .unlearn_diff_atk import unlearn_diff_atk

__all__ = [
    "Attack",
    "Inversion",
    "concept_inversion",
    "p4d",
    "relearning",
    "ring_a_bell",
    "unlearn_diff_atk",
]
