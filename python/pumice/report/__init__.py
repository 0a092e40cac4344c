"""Floor 5: results as pages that can be sent around."""

from __future__ import annotations

from .scan import scan_page

__all__ = ["scan_page"]
