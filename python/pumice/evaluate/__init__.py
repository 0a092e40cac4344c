"""Floor 4: what pictures are measured by, and the attacks that test an edit or a protection."""

from __future__ import annotations

from .attacks.inversion import Inversion, concept_inversion
from .classifiers import clip_classifier, image_classifier
from .clip import clip_agreement
from .contact_sheet import contact_sheet
from .erasure import Classify, Erasure, erasure
from .identity_matching import identity_matching_score
from .interpretation import Interpretation, interpretation
from .learnability import Learned, Learning, learnability
from .matrix import Matrix, Study, matrix, recovered
from .mismatch import Mismatch, mismatch
from .protection import Displacement, Protection, latent_displacement, protection, share_lost
from .sscd import sscd
from .study import embedded_study
from .visibility import Visibility, visibility

__all__ = [
    "Classify",
    "Displacement",
    "Erasure",
    "Interpretation",
    "Inversion",
    "Learned",
    "Learning",
    "Matrix",
    "Mismatch",
    "Protection",
    "Study",
    "Visibility",
    "clip_agreement",
    "clip_classifier",
    "concept_inversion",
    "contact_sheet",
    "embedded_study",
    "erasure",
    "identity_matching_score",
    "image_classifier",
    "interpretation",
    "latent_displacement",
    "learnability",
    "matrix",
    "mismatch",
    "protection",
    "recovered",
    "share_lost",
    "sscd",
    "visibility",
]
