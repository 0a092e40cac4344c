"""Floor 2: files."""

from __future__ import annotations

from .files import check_writable, write_whole

__all__ = ["check_writable", "write_whole"]
