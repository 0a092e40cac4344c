"""Protect a folder of pictures of any size; an interrupted run goes on where it stopped."""

from __future__ import annotations

import errno
import hashlib
import inspect
import math
import operator
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args, get_type_hints

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice import protect as methods
from pumice.io import Picture, check_writable, save_lossless
from pumice.protect.arguments import check_budget, checked_count

from . import manifest as manifests
from .manifest import Manifest, digest

Format = Literal["png", "webp"]

SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
CHUNK = 8  # pictures of a call on a GPU
_OF_THE_JOB = ("images", "pipe", "seed", "progress", "mask", "timesteps")  # the last two are a picture's own
_NOT_OF_THE_RESULT = ("batch_size", "recompute")
_OF_A_PICTURE = ("images:", "images[", "perturbed:")  # how errors begin that a picture is at fault for


@dataclass(frozen=True)
class Method:
    """A method as a job runs it.

    Attributes:
        function: of `pumice.protect`.
        per_subject: whether pictures are optimised together, and a folder is so the least that can be done.
    """

    function: str
    per_subject: bool = False


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
    "random": Method("random_noise"),
    "sds": Method("sds"),
    "sdst": Method("sdst"),
    "simac": Method("simac", per_subject=True),
}


@dataclass(frozen=True)
class Protection:
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
) -> Protection:
    """Run a method of `pumice.protect` over all pictures of a folder and its subfolders.

    `out` gets a picture for each, in the same subfolder and under the same name but for the suffix, and
    `manifest.jsonl`: a line of what the job is, then one for each picture that is done or failed, with paths
    relative to `source` and `out`. A second call does what is missing: pictures that are new, changed, failed
    or whose output is gone. However a run ends, no file is half-written.

    Methods that optimise pictures together (ACE, CAAT, FSMG, ASPL and what is made of them) take each folder
    that has pictures in it for one subject, whose pictures are done all or none.

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
    if format not in get_args(Format):
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(get_args(Format))}")
    seed, source, out = operator.index(seed), Path(source), Path(out)
    call = _Call(method, pipe, settings, progress=progress)
    chunk_size = call.chunk_size if chunk_size is None else checked_count("chunk_size", chunk_size)
    root, names, skipped = _walk(source, out)
    job = {"method": method, "format": format, "seed": seed} | call.described()
    check_writable(out, "out")
    with manifests.alone(out):
        manifest = Manifest(out, job, restart=restart)
        outputs = _outputs(names, manifest.lines, f".{format}")
        left = [name for name in names if not manifest.is_done(name, root / name)]
        start, done, there = time.perf_counter(), 0, len(names) - len(left)
        with tqdm(total=len(names), initial=there, unit="picture", desc=method, disable=not progress) as bar:
            for unit in _units(names, left, chunk_size, per_subject=call.method.per_subject):
                lines = [{"source": name, "sha256": digest(root / name)} for name in unit]
                results = _protected(call, root, unit, seed)
                with _writing(out):
                    manifest.begin()
                    for line, name in zip(lines, unit, strict=True):
                        line |= _saved(results[name], out, name, outputs[name])
                    manifest.append(lines)  # at once: what a kill cuts short is done again, in the same batch
                done += sum(line["status"] == "done" for line in lines)
                bar.update(len(set(unit).intersection(left)))
        seconds = (time.perf_counter() - start) / done if done else None
    return Protection(manifest.path, tuple(manifest.lines[name] for name in names), tuple(skipped), seconds)


class _Call:
    """A method with its models and settings.

    Attributes:
        method: of the table.
        chunk_size: by default.
        levels: how many of 255 a value may change, None without such a budget.
    """

    def __init__(self, method: str, pipe: Any, settings: Mapping[str, Any], *, progress: bool) -> None:
        self.method, self._settings = METHODS[method], dict(settings)
        self._function: Callable[..., Any] = getattr(methods, self.method.function)
        known = dict(inspect.signature(self._function).parameters)
        options = _options(self._function) if known.pop("options", None) else ()
        taken = {*known, *options}
        for name in settings:
            if name not in taken or name in _OF_THE_JOB:
                raise ValueError(f"{name}: got one, which {method} does not take")
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in (*_OF_THE_JOB, *settings):
                raise ValueError(f"{name}: got none, expected one, which {method} needs")
        if self.method.per_subject and "progress" in taken:  # the bar over pictures stands still for long
            self._settings["progress"] = progress
        effective = {name: each.default for name, each in known.items() if each.default is not each.empty}
        self._effective = ({"size": "resize"} if options else {}) | effective | self._settings

        several = isinstance(pipe, list | tuple)
        given = list(pipe) if several else [pipe]
        self._models = [models.load(each) for each in given] if "pipe" in taken else []
        self._pipe = [self._models if several else self._models[0]] if self._models else []
        on_gpu = any(model.device.type == "cuda" for model in self._models)
        batch_size = settings.get("batch_size")
        usual = CHUNK if on_gpu else 1
        self.chunk_size = usual if batch_size is None else checked_count("batch_size", batch_size)

        self.levels = None
        norm, eps = self._effective.get("norm", "linf"), self._effective.get("eps")
        if norm == "linf" and eps is not None:
            check_budget("eps", eps)
            self.levels = math.floor(255 * eps + 1e-4)

    def described(self) -> dict[str, Any]:
        """All that the results depend on, as JSON."""
        weights = [(models.fingerprint(each), models.drawing_state(each)["vae"]) for each in self._models]
        told = {
            name: _described(value)
            for name, value in self._effective.items()
            if name not in (*_OF_THE_JOB, *_NOT_OF_THE_RESULT)
        }
        return told | {"model": hashlib.sha256(repr(weights).encode()).hexdigest()[:16]}

    def __call__(self, pictures: Sequence[Picture], seeds: Sequence[int]) -> list[Image.Image]:
        images = [picture.with_pixels(picture.pixels) for picture in pictures]
        result: list[Image.Image] = self._function(images, *self._pipe, seed=list(seeds), **self._settings)
        return result


def _options(function: Callable[..., Any]) -> Collection[str]:
    """The names in the TypedDict of `**options`."""
    (options,) = get_args(get_type_hints(function)["options"])
    return get_type_hints(options).keys()


def _described(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_described(each) for each in value]
    if isinstance(value, PathLike):
        return digest(Path(value)) or str(value)
    if isinstance(value, Image.Image):
        return hashlib.sha256(f"{value.mode} {value.size}".encode() + value.tobytes()).hexdigest()
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + content).hexdigest()
    return getattr(value, "__qualname__", None) or repr(value)  # a function; something like a dataclass


def _walk(source: Path, out: Path) -> tuple[Path, list[str], list[str]]:
    """The folder that names are relative to, the pictures in it and what is passed over, sorted."""
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


def _outputs(names: Sequence[str], lines: Mapping[str, Mapping[str, Any]], suffix: str) -> dict[str, str]:
    """A file for each picture, no two the same even where case does not count; those there are stay."""
    outputs = {name: line["output"] for name, line in lines.items() if line["status"] == "done"}
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    taken = {path.casefold() for path in folders.union(outputs.values())}
    for name in names:
        if name not in outputs:
            output, longer = _usual(name, suffix), name
            while output.casefold() in taken:
                output = longer = longer + suffix
            outputs[name] = output
            taken.add(output.casefold())
    return outputs


def _usual(name: str, suffix: str) -> str:
    return str(PurePosixPath(name).with_suffix(suffix))


def _units(
    names: Sequence[str], left: Sequence[str], chunk_size: int, *, per_subject: bool
) -> list[list[str]]:
    """What goes into a call each."""
    if not per_subject:
        return [list(left[first : first + chunk_size]) for first in range(0, len(left), chunk_size)]
    subjects: dict[PurePosixPath, list[str]] = {}
    for name in names:
        subjects.setdefault(PurePosixPath(name).parent, []).append(name)
    return [subject for subject in subjects.values() if set(subject).intersection(left)]


def _seed(seed: int, name: str) -> int:
    """Of a picture, whatever else is in the folder."""
    found = hashlib.blake2b(f"{seed}/{name}".encode(errors="surrogateescape"), digest_size=7).digest()
    return int.from_bytes(found, "little")


# A picture and what its line says of it; or why there is none.
_Result = tuple[Image.Image, dict[str, Any]] | str


def _protected(call: _Call, root: Path, unit: Sequence[str], seed: int) -> dict[str, _Result]:
    """What becomes of each picture of a unit."""
    pictures: dict[str, Picture] = {}
    results: dict[str, _Result] = {}
    for name in unit:
        try:
            pictures[name] = Picture.open(root / name)
        except (ValueError, MemoryError) as error:
            results[name] = _reason(error, root / name)
    if not call.method.per_subject:
        return results | _called(call, pictures, seed)
    if not results:
        results = _called(call, pictures, seed)
    for name in unit:
        if isinstance(results.get(name), str):
            why = f"its folder is done whole or not at all, and {name!r} cannot be: {results[name]}"
            return dict.fromkeys(unit, why) | {name: results[name]}
    return results


def _called(call: _Call, pictures: Mapping[str, Picture], seed: int) -> dict[str, _Result]:
    if not pictures:
        return {}
    try:
        images = call(list(pictures.values()), [_seed(seed, name) for name in pictures])
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
        if isinstance(error, ValueError) and not str(error).startswith(_OF_A_PICTURE):
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
    return image, {
        "height": change.shape[1],
        "width": change.shape[2],
        "max_change": largest,
        "psnr": 10 * math.log10(255**2 * change.numel() / squares) if squares else None,
        "notes": list(picture.notes),
    }


def _saved(result: _Result, out: Path, name: str, output: str) -> dict[str, Any]:
    """Write a picture; what its line says of it."""
    if isinstance(result, str):
        return {"status": "failed", "reason": result}
    image, facts = result
    path, usual = out / output, _usual(name, PurePosixPath(output).suffix)
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


def _reason(error: Exception, path: Path | None = None) -> str:
    """In one line, without the names of argument and file."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out of memory"
    text = str(error.strerror if isinstance(error, OSError) else error).replace(f" {str(path)!r}", "")
    return " ".join(text.split()).removeprefix("images: ").removeprefix("path: ")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"out: cannot write to {str(out)!r}: {error.strerror}; what is done stays; call again to go on"
        ) from error
