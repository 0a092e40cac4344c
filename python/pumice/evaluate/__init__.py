"""Floor 4: what pictures are measured by, and the attacks that test an edit or a protection."""

from __future__ import annotations

from .classifiers import clip_classifier, image_classifier
from .clip import clip_agreement
from .contact_sheet import contact_sheet
from .erasure import Classify, Erasure, erasure
from .inversion import Inversion, concept_inversion
from .learnability import Learned, Learning, learnability
from .protection import Displacement, Protection, latent_displacement, protection, share_lost
from .sscd import sscd
from .visibility import Visibility, visibility

__all__ = [
    "Classify",
    "Displacement",
    "Erasure",
    "Inversion",
    "Learned",
    "Learning",
    "Protection",
    "Visibility",
    "clip_agreement",
    "clip_classifier",
    "concept_inversion",
    "contact_sheet",
    "erasure",
    "image_classifier",
    "latent_displacement",
    "learnability",
    "protection",
    "share_lost",
    "sscd",
    "visibility",
]
