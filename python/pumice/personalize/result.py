"""What a method of personalization returns: a pipeline that has learned, and how to keep it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from pumice.io import check_writable


@dataclass(frozen=True, eq=False)
class Personalized:
    """A pipeline that has learned a subject.

    Attributes:
        pipe: of diffusers' own class; what did not train is shared with the pipeline that it came from.
        losses: (steps,) float32, of each step before its update.
        settings: of the training.
        noise_phrase: that noise was put down to, or None.
    """

    pipe: Any
    losses: Tensor
    settings: dict[str, Any]
    noise_phrase: str | None
    _write: Callable[[Path], None]

    def save(self, folder: str | PathLike[str]) -> None:
        """Write what plain diffusers loads: `<folder>` is new, and whole when it is there.

        All weights are a pipeline for `from_pretrained`; LoRA is for `load_lora_weights`, embeddings for
        `load_textual_inversion`. Beside it lies `personalization.json`, the settings.

        Raises:
            ValueError: if the folder is there already or cannot be written.
            OSError: if the disk is full; nothing is left behind.
        """
        path = Path(folder)
        if path.exists():
            raise ValueError(f"folder: {str(path)!r} is there already, expected a new name")
        check_writable(path.parent, "folder")
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            self._write(partial)
            (partial / "personalization.json").write_text(json.dumps(self.to_dict(), indent=1))
            partial.rename(path)
        except SafetensorError as error:  # as a full disk is to safetensors
            raise OSError(f"folder: {str(path)!r} could not be written: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return {
            "settings": dict(self.settings),
            "noise_phrase": self.noise_phrase,
            "losses": self.losses.tolist(),
        }
