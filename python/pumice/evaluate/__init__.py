"""Floor 4: what pictures are measured by, and the attacks that test an edit."""

from __future__ import annotations

from .classifiers import clip_classifier, image_classifier
from .clip import clip_agreement
from .contact_sheet import contact_sheet
from .erasure import Classify, Erasure, erasure
from .inversion import Inversion, concept_inversion
from .sscd import sscd

__all__ = [
    "Classify",
    "Erasure",
    "Inversion",
    "clip_agreement",
    "clip_classifier",
    "concept_inversion",
    "contact_sheet",
    "erasure",
    "image_classifier",
    "sscd",
]
