"""Floor 2: files."""

from __future__ import annotations

from .files import check_writable, write_whole
from .parts import Parts
from .pictures import read_image

__all__ = ["Parts", "check_writable", "read_image", "write_whole"]
