"""Floor 4: what pictures are measured by."""

from __future__ import annotations

from .clip import clip_agreement
from .sscd import sscd

__all__ = ["clip_agreement", "sscd"]
