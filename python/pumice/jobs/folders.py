"""The pictures of a folder, and the names of what is made of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from pumice.io import Picture, check_writable

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


def subject(source: Path, *, skip_broken: bool) -> tuple[Path, list[str], list[str]]:
    """The folder of one subject, the names of the pictures right in it, and why others are left out.

    Raises:
        ValueError: if there are none, or one cannot be read and is not to be skipped.
    """
    root, names = right_in(source, "source")
    found, broken = [], []
    for name in names:
        try:
            Picture.open(root / name, "source")
            found.append(name)
        except ValueError as error:
            if not skip_broken:
                raise ValueError(f"{error}; mend it, take it away or skip what is broken") from error
            broken.append(str(error))
    if not found:
        raise ValueError(f"source: none of the pictures of {str(source)!r} can be read")
    return root, found, broken


def right_in(source: Path, argument: str) -> tuple[Path, list[str]]:
    """A folder and the names of the pictures in it, of those below not; or of one picture."""
    if not source.exists():
        raise ValueError(f"{argument}: there is no {str(source)!r}, expected a folder or a picture")
    if not source.is_dir():
        return source.parent, [source.name]
    try:
        names = sorted(path.name for path in source.iterdir() if _is_picture(path))
    except OSError as error:
        raise ValueError(f"{argument}: cannot read {str(source)!r}: {error.strerror}") from error
    if not names:
        expected = ", ".join(sorted(SUFFIXES))
        raise ValueError(f"{argument}: {str(source)!r} has no pictures in it, expected some of {expected}")
    return source, names


def check_new(out: Path) -> None:
    """Make sure that a folder is not there and can be made; nothing is made.

    Raises:
        ValueError: if not.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"out: {str(out)!r} is there already, expected a new name")
    check_writable(next(path for path in out.absolute().parents if path.exists()), "out")


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
            left_out = is_folder and (_is_passed_over(path) or _is_result(path, out))
            if left_out:
                folders.remove(entry)
            if left_out or not is_folder:
                (names if _is_picture(path) else skipped).append(path.relative_to(source).as_posix())
    if not names:
        raise ValueError(
            f"source: {str(source)!r} has no pictures among {len(skipped)} files, expected some of "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    return source, sorted(names), sorted(skipped)


def _is_picture(path: Path) -> bool:
    return not _is_passed_over(path) and path.suffix.lower() in SUFFIXES and path.is_file()


def _is_passed_over(path: Path) -> bool:
    return path.name.startswith(".") or path.is_symlink()


def _is_result(folder: Path, out: Path) -> bool:
    """Whether a folder is what a job writes to, this one or another."""
    return folder.resolve() == out.resolve() or bool(manifests.read(folder / manifests.NAME))
