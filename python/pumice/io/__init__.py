"""Floor 2: files."""

from __future__ import annotations

from .files import check_writable, write_whole
from .lora import LoraFormat, save_lora
from .parts import Parts
from .pictures import Picture, open_pictures, read_image, save_lossless, within_budget
from .single_file import save_single_file

__all__ = [
    "LoraFormat",
    "Parts",
    "Picture",
    "check_writable",
    "open_pictures",
    "read_image",
    "save_lora",
    "save_lossless",
    "save_single_file",
    "within_budget",
    "write_whole",
]
