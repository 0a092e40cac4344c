"""Floor 4: lists and folders of any size, worked through in shards that survive an interruption."""

from __future__ import annotations

from .prompts import read_labels, read_pairs, read_prompts
from .protect import METHODS, Protection, protect
from .scan import Detail, Scan, scan

__all__ = [
    "METHODS",
    "Detail",
    "Protection",
    "Scan",
    "protect",
    "read_labels",
    "read_pairs",
    "read_prompts",
    "scan",
]
