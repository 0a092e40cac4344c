"""Floor 4: lists and folders of any size, worked through in shards that survive an interruption."""

from __future__ import annotations

from .prompts import read_prompts
from .scan import Scan, scan

__all__ = ["Scan", "read_prompts", "scan"]
