"""The pictures of a folder, and the names of what is made of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from pumice.io import check_writable

from . import manifest as manifests

SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)


def pictures(source: Path, out: Path) -> tuple[Path, list[str], list[str]]:
    """The folder that names are relative to, the pictures in it and what is passed over, sorted.

    Raises:
        ValueError: if there are none, or `out` cannot be where results go; nothing is made there.
    """
    found = _walk(source, out)
    nearest = next(path for path in (out, *out.parents) if os.path.exists(path))
    if out.suffix.lower() in SUFFIXES and nearest != out:
        raise ValueError(f"out: got {str(out)!r}, the name of a picture, expected that of a folder")
    check_writable(nearest, "out")
    if nearest == out:
        manifests.check_free(out)
    return found


def sizes(root: Path, names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Height and width of the pictures whose headers can be read, as they lie in their files."""
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large pictures; the job itself warns
                with Image.open(root / name) as image:
                    yield image.height, image.width
        except Exception:  # the job says why, with the name
            continue


def outputs(names: Sequence[str], lines: Mapping[str, Mapping[str, Any]], suffix: str) -> dict[str, str]:
    """A file for each picture, no two the same even where case does not count; those there are stay."""
    found = {name: line["output"] for name, line in lines.items() if line["status"] == "done"}
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    taken = {path.casefold() for path in folders.union(found.values())}
    for name in names:
        if name not in found:
            output, longer = usual(name, suffix), name
            while output.casefold() in taken:
                output = longer = longer + suffix
            found[name] = output
            taken.add(output.casefold())
    return found


def usual(name: str, suffix: str) -> str:
    return str(PurePosixPath(name).with_suffix(suffix))


def _walk(source: Path, out: Path) -> tuple[Path, list[str], list[str]]:
    if not source.exists():
        raise ValueError(f"source: there is no {str(source)!r}, expected a folder or a picture")
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"out: got {str(out)!r}, which holds the source, expected another folder")
    if not source.is_dir():
        return source.parent, [source.name], []

    def refuse(error: OSError) -> None:
        raise ValueError(f"source: cannot read {str(error.filename)!r}: {error.strerror}") from error

    names: list[str] = []
    skipped: list[str] = []
    for folder, folders, files in os.walk(source, onerror=refuse):
        for entry in [*folders, *files]:
            path, is_folder = Path(folder, entry), entry in folders
            left_out = entry.startswith(".") or path.is_symlink() or (is_folder and _is_result(path, out))
            if is_folder and left_out:
                folders.remove(entry)
            if left_out or not is_folder:
                picture = not left_out and path.suffix.lower() in SUFFIXES and path.is_file()
                (names if picture else skipped).append(path.relative_to(source).as_posix())
    if not names:
        raise ValueError(
            f"source: {str(source)!r} has no pictures among {len(skipped)} files, expected some of "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    return source, sorted(names), sorted(skipped)


def _is_result(folder: Path, out: Path) -> bool:
    """Whether a folder is what a job writes to, this one or another."""
    return folder.resolve() == out.resolve() or bool(manifests.read(folder / manifests.NAME))
