"""Floor 3: find what a model replays of its training pictures."""

from __future__ import annotations

from .detect import Detection, detect
from .threshold import threshold_at

__all__ = ["Detection", "detect", "threshold_at"]
