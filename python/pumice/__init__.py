"""Protect, purify, personalize, erase and audit with text-to-image diffusion models.

Importing `pumice` is cheap: its parts, and torch with them, are imported when they are first used.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from pumice.env import env

try:
    __version__ = metadata.version("pumice")
except metadata.PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"

_PARTS = (
    "erase",
    "evaluate",
    "io",
    "jobs",
    "memorization",
    "models",
    "ops",
    "personalize",
    "pipelines",
    "protect",
    "purify",
    "testbed",
)

__all__ = ["__version__", "env", *_PARTS]


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"pumice.{name}")
    raise AttributeError(f"module 'pumice' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
