"""Plain data and tensors together in one safetensors file that is whole, or is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from pumice.io import write_whole

_FORMAT = "pumice.edit.2"
_KEY = "pumice.tensor"


def write(path: Path, tree: Any) -> None:
    """Write dicts, lists, strings, numbers and CPU tensors: a tensor that stands in several places once."""
    tensors: dict[int, tuple[str, Tensor]] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {_KEY: tensors.setdefault(id(value), (str(len(tensors)), value.contiguous()))[0]}
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    about = json.dumps(plain(tree))
    named = dict(tensors.values())
    header = {"format": _FORMAT, "edit": about, "sha256": _digest(about, named)}
    write_whole(path, safetensors.torch.save(named, header))


def read(path: str | PathLike[str]) -> Any:
    """What `write` wrote; a tensor that stood in several places is one again.

    Raises:
        OSError, SafetensorError, ValueError, KeyError, TypeError: for anything else.
    """
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata() or {}
        if header.get("format") != _FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}, expected {_FORMAT!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header.get("sha256") != _digest(header["edit"], tensors):
        raise ValueError("its content is not what was saved")
    return json.loads(header["edit"], object_hook=lambda item: tensors[item[_KEY]] if _KEY in item else item)


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
