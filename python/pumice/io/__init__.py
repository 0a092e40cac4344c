"""Floor 2: files."""

from __future__ import annotations

from .files import check_writable, write_whole
from .parts import Parts

__all__ = ["Parts", "check_writable", "write_whole"]
