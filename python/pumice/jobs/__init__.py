"""Floor 4: lists and folders of any size, worked through in shards that survive an interruption."""

from __future__ import annotations

from .personalize import TRAININGS, personalize
from .pictures import Outcome
from .prompts import read_labels, read_pairs, read_prompts
from .protect import METHODS, protect
from .purify import PURIFIERS, purify
from .scan import Detail, Scan, scan

__all__ = [
    "METHODS",
    "PURIFIERS",
    "TRAININGS",
    "Detail",
    "Outcome",
    "Scan",
    "personalize",
    "protect",
    "purify",
    "read_labels",
    "read_pairs",
    "read_prompts",
    "scan",
]
