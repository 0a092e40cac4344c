"""Purify a folder of pictures of any size; an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from pumice import purify as methods
from pumice.purify import filters

from . import folders
from .methods import Call, Method
from .pictures import Format, Outcome, work

PURIFIERS: Mapping[str, Method] = {
    "adverse_cleaner": Method("adverse_cleaner", None),
    "bilateral": Method("bilateral", None),
    "bit_depth": Method("bit_depth", None),
    "codesr": Method("codesr", "upscaler"),
    "compress_and_resize": Method("compress_and_resize", None),
    "ddspure": Method("ddspure", "denoiser"),
    "diffpure": Method("diffpure", "denoiser"),
    "gaussian": Method("gaussian", None),
    "gridpure": Method("gridpure", "denoiser"),
    "guided": Method("guided", None),
    "impress": Method("impress"),
    "jpeg": Method("jpeg", None),
    "latent_diffpure": Method("latent_diffpure"),
    "median": Method("median", None),
    "noisy_upscaling": Method("noisy_upscaling", "upscaler"),
    "pdm_pure": Method("pdm_pure", "denoiser"),
    "resize": Method("resize", None),
    "total_variation": Method("total_variation", None),
    "tvm": Method("tvm", None),
}


def purify(
    model: Any,
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
    """Run a method or filter of `pumice.purify` over all pictures of a folder and its subfolders.

    What is written, how a run goes on, and where random numbers come from is as of `jobs.protect`.

    Args:
        model: what the method works by: a denoiser of pixels (diffpure, gridpure, ddspure, pdm_pure), a
            text-to-image pipeline (latent_diffpure, impress), an upscaler (noisy_upscaling, codesr), or None
            for a filter.
        source: a folder, or one picture. Hidden files, links and names that are not of a picture are skipped.
        out: a folder that is new, empty or of the same job; it may lie in `source`.
        method: a key of `jobs.PURIFIERS`.
        format: of what is written, both without loss.
        chunk_size: pictures of one call of the method, and what an interruption loses. Default `batch_size`
            if that is given, else 8 on a GPU, and 1 on the CPU.
        seed: of all random numbers.
        restart: throw away what `out` has of an earlier job.
        progress: show a bar over pictures.
        settings: of the method.

    Raises:
        ValueError, TypeError: if `source` has no pictures, `out` cannot be used, or the method refuses its
            settings. A picture that cannot be done is none of these but a line of the manifest.
        OSError: if the disk is full or gone; the call can be repeated.
    """
    found = folders.pictures(Path(source), Path(out))
    return work(
        purification(method, model, settings),
        found,
        Path(out),
        format=format,
        chunk_size=chunk_size,
        seed=seed,
        restart=restart,
        progress=progress,
    )


def purification(name: str, model: Any, settings: Mapping[str, Any]) -> Call:
    """A purifier with its model and settings, ready for pictures.

    Raises:
        ValueError, TypeError: as `jobs.purify`.
    """
    if name not in PURIFIERS:
        raise ValueError(f"method: got {name!r}, expected one of {', '.join(PURIFIERS)}")
    method = PURIFIERS[name]
    function = getattr(methods if method.model else filters, method.function)
    return Call(name, method, function, model, settings, progress=False)
