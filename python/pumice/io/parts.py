"""Finished parts of a long job, kept so that it can go on after an interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pumice

from .files import write_whole


class Parts:
    """The folder of finished parts of one job; the first part to be put there makes it that job's."""

    def __init__(self, folder: Path, job: dict[str, Any], *, restart: bool) -> None:
        """Open the folder of `job`, everything that the parts depend on; `restart` throws away what is there.

        Raises:
            ValueError: if the folder is not one of parts and not empty, or holds those of another job.
        """
        self._folder, self._manifest = folder, folder / "manifest.json"
        self._job = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
        if not self._manifest.exists() and not _unused(folder):
            raise ValueError(f"out: {str(folder)!r} is there and is not pumice's, it has no manifest.json")
        if restart and folder.exists():
            shutil.rmtree(folder)
        if self._manifest.exists() and json.loads(self._manifest.read_text()).get("job") != self._job:
            raise ValueError(
                f"out: {str(folder.parent)!r} holds results of another model, list or settings; "
                "choose another folder, or restart"
            )

    def __contains__(self, name: str) -> bool:
        return self.path(name).exists()

    def path(self, name: str) -> Path:
        return self._folder / name

    def put(self, name: str, content: str | bytes) -> None:
        if not self._manifest.exists():
            self._folder.mkdir(exist_ok=True)
            write_whole(self._manifest, json.dumps({"pumice": pumice.__version__, "job": self._job}))
        write_whole(self.path(name), content)


def _unused(folder: Path) -> bool:
    """Whether nothing is there but what a kill leaves before the manifest is whole."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.suffix == ".partial" for path in folder.iterdir())
