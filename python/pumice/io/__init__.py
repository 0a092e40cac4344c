"""Floor 2: files."""

from __future__ import annotations

from .files import check_writable, write_whole
from .lora import LoraFormat, save_lora
from .parts import Parts
from .pictures import read_image
from .single_file import save_single_file

__all__ = [
    "LoraFormat",
    "Parts",
    "check_writable",
    "read_image",
    "save_lora",
    "save_single_file",
    "write_whole",
]
