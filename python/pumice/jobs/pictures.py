"""A method over the pictures of a folder of any size; an interrupted run goes on where it stopped."""

from __future__ import annotations

import errno
import hashlib
import math
import operator
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import torch
from PIL import Image
from tqdm.auto import tqdm

from pumice.io import Picture, check_writable, save_lossless
from pumice.models.arguments import checked_count

from . import folders
from . import manifest as manifests
from .manifest import Manifest, digest
from .methods import Call

Format = Literal["png", "webp"]

_OF_A_PICTURE = ("images:", "images[", "perturbed:")  # how errors begin that a picture is at fault for
_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory")


@dataclass(frozen=True)
class Outcome:
    """What became of a folder.

    Attributes:
        manifest: the file that says so, too.
        lines: of the manifest, one for each picture of the source, sorted by its name.
        skipped: names of what is no picture, is hidden or is a link.
        seconds: for each picture that was done in this call; None if there was none.
    """

    manifest: Path
    lines: tuple[dict[str, Any], ...]
    skipped: tuple[str, ...]
    seconds: float | None

    @property
    def done(self) -> int:
        return sum(line["status"] == "done" for line in self.lines)

    @property
    def failed(self) -> int:
        return len(self.lines) - self.done

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self) | {"done": self.done, "failed": self.failed}
        return found | {"manifest": str(self.manifest), "lines": list(self.lines)}


def work(
    call: Call,
    found: tuple[Path, Sequence[str], Sequence[str]],
    out: Path,
    *,
    format: Format,
    chunk_size: int | None,
    seed: int,
    restart: bool,
    progress: bool,
) -> Outcome:
    """Do what is missing in `out` of a job over pictures.

    Args:
        call: what is done to them.
        found: as of `folders.pictures`: a folder, the names in it, and those of what is passed over.
        out: a folder that is new, empty or of the same job.
        format, chunk_size, seed, restart, progress: as of `jobs.protect`.

    Raises:
        ValueError, TypeError: as `jobs.protect`.
        OSError: if the disk is full or gone; the call can be repeated.
    """
    if format not in get_args(Format):
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(get_args(Format))}")
    seed, (root, names, skipped) = operator.index(seed), found
    chunk_size = call.chunk_size if chunk_size is None else checked_count("chunk_size", chunk_size)
    job = {"method": call.name, "format": format, "seed": seed} | call.described()
    check_writable(out, "out")
    with manifests.alone(out):
        manifest = Manifest(out, job, restart=restart)
        outputs = folders.outputs(names, manifest.lines, f".{format}")
        left = [name for name in names if not manifest.is_done(name, root / name)]
        start, done, there = time.perf_counter(), 0, len(names) - len(left)
        with tqdm(
            total=len(names), initial=there, unit="picture", desc=call.name, disable=not progress
        ) as bar:
            for unit, todo in _units(names, left, chunk_size, per_subject=call.method.per_subject):
                digests = {name: digest(root / name) for name in unit}
                results = _done(call, root, unit, todo, seed)
                with writing(out):
                    manifest.begin()
                    lines = [
                        {"source": name, "sha256": digests[name]}
                        | _saved(results[name], out, name, outputs[name])
                        for name in unit
                        if name in results
                    ]
                    manifest.append(lines)  # at once: what a kill cuts short is done again, in the same batch
                done += sum(line["status"] == "done" for line in lines)
                bar.update(len(todo))
        seconds = (time.perf_counter() - start) / done if done else None
    return Outcome(manifest.path, tuple(manifest.lines[name] for name in names), tuple(skipped), seconds)


def _units(
    names: Sequence[str], left: Sequence[str], chunk_size: int, *, per_subject: bool
) -> list[tuple[list[str], set[str]]]:
    """What goes into a call each, and what of it is left to be done."""
    if not per_subject:
        chunks = [list(left[first : first + chunk_size]) for first in range(0, len(left), chunk_size)]
        return [(chunk, set(chunk)) for chunk in chunks]
    subjects: dict[PurePosixPath, list[str]] = {}
    for name in names:
        subjects.setdefault(PurePosixPath(name).parent, []).append(name)
    missing = set(left)
    return [(subject, todo) for subject in subjects.values() if (todo := missing.intersection(subject))]


def _seed(seed: int, name: str) -> int:
    """Of a picture, whatever else is in the folder."""
    found = hashlib.blake2b(f"{seed}/{name}".encode(errors="surrogateescape"), digest_size=7).digest()
    return int.from_bytes(found, "little")


# A picture and what its line says of it; or why there is none.
_Result = tuple[Image.Image, dict[str, Any]] | str


def _done(call: Call, root: Path, unit: Sequence[str], todo: set[str], seed: int) -> dict[str, _Result]:
    """What becomes of the pictures of a unit, if any of those still to do can be done."""
    pictures: dict[str, Picture] = {}
    failed: dict[str, _Result] = {}
    for name in unit:
        try:
            pictures[name] = call.open(root / name)
        except (ValueError, MemoryError, RuntimeError) as error:
            if not (isinstance(error, ValueError) or _is_out_of_memory(error)):
                raise
            if name in todo:
                failed[name] = _reason(error, root / name)
    if not todo.intersection(pictures):
        return failed
    return failed | _called(call, pictures, seed)


def _called(call: Call, pictures: Mapping[str, Picture], seed: int) -> dict[str, _Result]:
    try:
        images = call(list(pictures.values()), [_seed(seed, name) for name in pictures])
    except (ValueError, MemoryError, RuntimeError) as error:
        if not (_is_out_of_memory(error) or _is_of_a_picture(error)):
            raise  # the settings are at fault, and would be for every picture
        if len(pictures) == 1 or call.method.per_subject:
            return dict.fromkeys(pictures, _reason(error))
        alone = [_called(call, {name: picture}, seed) for name, picture in pictures.items()]
        return {name: result for each in alone for name, result in each.items()}
    return {
        name: _compared(picture, image, call.levels)
        for (name, picture), image in zip(pictures.items(), images, strict=True)
    }


def _compared(picture: Picture, image: Image.Image, levels: int | None) -> _Result:
    change = Picture.open(image).pixels.int() - picture.pixels.int()
    largest, squares = int(change.abs().max()), int(change.square().sum())
    if levels is not None and largest > levels:
        return f"changed by {largest} of 255, expected at most {levels}"
    unchanged = [] if largest or levels == 0 else ["nothing changed"]
    return image, {
        "height": change.shape[1],
        "width": change.shape[2],
        "max_change": largest,
        "psnr": 10 * math.log10(255**2 * change.numel() / squares) if squares else None,
        "notes": [*picture.notes, *unchanged],
    }


def _saved(result: _Result, out: Path, name: str, output: str) -> dict[str, Any]:
    """Write a picture; what its line says of it."""
    if isinstance(result, str):
        return {"status": "failed", "reason": result}
    image, facts = result
    path, usual = out / output, folders.usual(name, PurePosixPath(output).suffix)
    if output != usual:
        facts["notes"].append(f"named {output!r}, because {usual!r} is of another picture")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_lossless(image, path)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise  # the disk is at fault, and would be for every picture
        return {"status": "failed", "reason": _reason(error, path)}
    return {"status": "done", "output": output, **facts}


def _is_of_a_picture(error: Exception) -> bool:
    return isinstance(error, ValueError) and str(error).startswith(_OF_A_PICTURE)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's of the CPU is a plain RuntimeError, and so is what TorchScript makes of a GPU's
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _OUT_OF_MEMORY)


def _reason(error: Exception, path: Path | None = None) -> str:
    """In one line, without the names of argument and file."""
    if _is_out_of_memory(error):
        return "out of memory"
    text = str(error.strerror if isinstance(error, OSError) else error).replace(f" {str(path)!r}", "")
    return re.sub(r"^(images(\[\d+\])?|path): ", "", " ".join(text.split()))


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Inside the block, errors of the disk say that nothing is lost."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"out: cannot write to {str(out)!r}: {reason}; what is done stays; call again to go on"
        ) from error
