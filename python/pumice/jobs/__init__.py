"""Floor 4: lists and folders of any size, worked through in shards that survive an interruption."""

from __future__ import annotations

from .methods import METHODS
from .prompts import read_labels, read_pairs, read_prompts
from .protect import Protected, protect
from .scan import Detail, Scan, scan

__all__ = [
    "METHODS",
    "Detail",
    "Protected",
    "Scan",
    "protect",
    "read_labels",
    "read_pairs",
    "read_prompts",
    "scan",
]
