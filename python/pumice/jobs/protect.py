"""Protect a folder of pictures of any size; an interrupted run goes on where it stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from pumice import protect as methods
from pumice.io import Picture
from pumice.models.arguments import check_budget
from pumice.protect.fitting import fit

from . import folders
from .methods import Call, Method
from .pictures import Format, Outcome, work

METHODS: Mapping[str, Method] = {
    "ace": Method("ace", per_subject=True),
    "advdm": Method("advdm"),
    "aspl": Method("aspl", per_subject=True),
    "caat": Method("caat", per_subject=True),
    "easpl": Method("easpl", per_subject=True),
    "fsmg": Method("fsmg", per_subject=True),
    "glaze": Method("glaze"),
    "metacloak": Method("metacloak", per_subject=True),
    "mist": Method("mist"),
    "photoguard": Method("photoguard"),
    "photoguard_diffusion": Method("photoguard_diffusion"),
    "random": Method("random_noise", None),
    "sds": Method("sds"),
    "sdst": Method("sdst"),
    "simac": Method("simac", per_subject=True),
}


def protect(
    pipe: Any,
    source: str | PathLike[str],
    out: str | PathLike[str],
    method: str,
    *,
    format: Format = "png",
    chunk_size: int | None = None,
    seed: int = 0,
    restart: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Outcome:
    """Run a method of `pumice.protect` over all pictures of a folder and its subfolders.

    `out` gets a picture for each, in the same subfolder and under the same name but for the suffix, and
    `manifest.jsonl`: a line of what the job is, then one for each picture that is done or failed, with paths
    relative to `source` and `out`. A second call does what is missing: pictures that are new, changed, failed
    or whose output is gone. However a run ends, no file is half-written.

    Methods that optimise pictures together (ACE, CAAT, FSMG, ASPL and what is made of them) take each folder
    that has pictures in it for one subject: those that can be read are done together, and all of them again
    if there is another one later.

    A picture's random numbers come from `seed` and its path in `source`, so that its result is the same
    whatever else is there: to the bit where it goes through the networks alone (a chunk of 1), else up to the
    rounding of batches.

    Args:
        pipe: as of the method; None for one that takes none.
        source: a folder, or one picture. Hidden files, links and names that are not of a picture are skipped.
        out: a folder that is new, empty or of the same job; it may lie in `source`.
        method: a key of `jobs.METHODS`.
        format: of what is written, both without loss.
        chunk_size: pictures of one call of the method, and what an interruption loses. Default `batch_size`
            if that is given, else 8 on a GPU, and 1 on the CPU, where a picture takes minutes.
        restart: throw away what `out` has of an earlier job.
        progress: show a bar over pictures.
        settings: of the method.

    Raises:
        ValueError, TypeError: if `source` has no pictures, `out` cannot be used, or the method refuses its
            settings. A picture that cannot be done is none of these but a line of the manifest.
        OSError: if the disk is full or gone; the call can be repeated.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    found = folders.pictures(Path(source), Path(out))
    call = _Protection(method, pipe, settings, progress=progress)
    return work(
        call,
        found,
        Path(out),
        format=format,
        chunk_size=chunk_size,
        seed=seed,
        restart=restart,
        progress=progress,
    )


class _Protection(Call):
    """A protection: its results obey a budget, and its pictures have to fit the model."""

    def __init__(self, name: str, pipe: Any, settings: Mapping[str, Any], *, progress: bool) -> None:
        method = METHODS[name]
        super().__init__(name, method, getattr(methods, method.function), pipe, settings, progress=progress)
        norm, eps = self.effective.get("norm", "linf"), self.effective.get("eps")
        if norm == "linf" and eps is not None:
            check_budget("eps", eps)
            self.levels = math.floor(255 * eps + 1e-4)

    def open(self, path: Path) -> Picture:
        picture = super().open(path)
        if self.models and "size" in self.effective:
            _, height, width = picture.pixels.shape
            fit(height, width, self.models, self.effective["size"])
        return picture
