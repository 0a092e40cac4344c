"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it: readers see the new one, or the one before."""
    partial = _partial(path)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """A temporary name beside it; a short one, as the name itself may be as long as names can be."""
    key = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return path.with_name(f".{key}.{os.getpid()}.partial")


def check_writable(folder: Path, name: str) -> None:
    """Make `folder` and make sure that files can be written there.

    Raises:
        ValueError: naming the argument `name`, if not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name}: cannot write to {str(folder)!r}: {error.strerror}") from error


def new_file(path: str | PathLike[str], name: str = "path") -> Path:
    """The path of a safetensors file to be written, its folder made; errors call it `name`.

    Raises:
        ValueError: for another suffix, something that is there already, or a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{name}: got {str(path)!r}, expected a name that ends in .safetensors")
    if path.exists():
        raise ValueError(f"{name}: {str(path)!r} is there already, expected a new name")
    check_writable(path.parent, name)
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors as a safetensors file, under a temporary name until it is whole."""
    partial = _partial(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors leaves a file that only its owner can read
        save_file(dict(tensors), partial, {"format": "pt", **metadata})
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
