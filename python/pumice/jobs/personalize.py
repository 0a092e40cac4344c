"""From a folder of pictures to a model that has learned them; an interrupted run goes on where it stopped."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from safetensors import SafetensorError, safe_open

from pumice import models
from pumice import personalize as methods
from pumice.evaluate.contact_sheet import contact_sheet
from pumice.io import check_writable, save_lossless
from pumice.models.arguments import checked_count
from pumice.personalize import Personalized
from pumice.personalize.arguments import warn
from pumice.personalize.decoupling import check_prompts
from pumice.training.checkpoint import NAME as CHECKPOINT

from . import folders
from . import manifest as manifests
from .methods import Call
from .pictures import work, writing
from .purify import PURIFIERS, purification

TRAININGS = ("dreambooth", "textual_inversion")

_OF_THE_JOB = ("pipe", "images", "checkpoint", "seed", "progress")
_PARTS = ("purified", "training")  # of a checkpoint
_PATIENCE = timedelta(days=7)  # of processes that wait for one that purifies or draws


def personalize(
    pipe: Any,
    source: str | PathLike[str],
    out: str | PathLike[str],
    method: str = "dreambooth",
    *,
    purifiers: Sequence[str] = (),
    denoiser: Any = None,
    upscaler: Any = None,
    samples: int = 4,
    skip_broken: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    restart: bool = False,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> Personalized:
    """Personalize a model from the pictures of a folder, purified before if wanted.

    `out` gets what `Personalized.save` writes, `purified/` with the pictures as they were learned if they
    were purified, and `samples.png`, drawn by `personalize.sample`. It is there when all of that is. An
    interrupted call, repeated, takes purified pictures and steps of the training from `checkpoint`.

    Several processes (`accelerate launch`) share the training, and the first of them does the rest.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel, on the device of the process; it is
            not changed. Or a function without arguments that opens one, called when all else is checked.
        source: a folder, of which the pictures directly in it are one subject's, or one picture. Hidden
            files, links and names that are not of a picture are passed over.
        out: a new folder.
        method: "dreambooth" or "textual_inversion", of `pumice.personalize`.
        purifiers: keys of `jobs.PURIFIERS`, one after the other, with their defaults.
        denoiser, upscaler: what purifiers work by that need one, or functions that open it.
        samples: pictures to draw, of `prompt` or of "a photo of" the placeholder. Default 4.
        skip_broken: leave out pictures that cannot be read or purified; by default they are an error, as a
            subject's set should be whole.
        checkpoint: a folder to go on from, outside of `out`. By default a hidden one beside `out` that goes
            when all is done.
        restart: throw away what an interrupted call has left in it, and nothing else.
        seed: of all random numbers.
        progress: show bars.
        settings: of the method; `class_images` may be a folder, too.

    Returns:
        What the method returns, with the names of pictures and purifiers among its settings.

    Warns:
        PersonalizationWarning: for each picture that is left out, and as of the method.

    Raises:
        ValueError, TypeError: if there are no pictures, one is broken, `out` is there already, `checkpoint`
            is in it or of another training, another process is at work there, or the method or a purifier
            refuses its settings.
        OSError: if the disk is full or gone; the call can be repeated.
    """
    function, prompt = _checked(method, settings)
    samples = checked_count("samples", samples, least=0)
    source, out = Path(source), Path(out)
    folders.check_new(out)
    folder = out.with_name(f".{out.name}.training") if checkpoint is None else Path(checkpoint)
    _check_apart(folder, out)
    networks = {"pipe": pipe, "denoiser": denoiser, "upscaler": upscaler}
    _check_purifiers(purifiers, networks)
    root, names, broken = folders.subject(source, skip_broken=skip_broken)
    for reason in broken:
        warn(f"{reason}; it is left out")
    if isinstance(settings.get("class_images"), str | PathLike):
        of_class, files = folders.right_in(Path(settings["class_images"]), "class_images")
        settings["class_images"] = [of_class / file for file in files]
    networks = {kind: each() if inspect.isfunction(each) else each for kind, each in networks.items()}
    model = networks["pipe"] = models.load(networks["pipe"])
    kinds = [(name, PURIFIERS[name].model) for name in purifiers]
    calls = [purification(name, networks[kind] if kind else None, {}) for name, kind in kinds]
    made = [each for each in (folder / "training", folder) if checkpoint is None or not each.exists()]
    check_writable(folder, "checkpoint")
    state = processes()
    main = state.is_main_process
    try:
        with manifests.alone(folder, "checkpoint") if main else nullcontext():
            if main and restart:
                _forget(folder / "training")
            for number, call in enumerate(calls if main else (), 1):
                target = folder / "purified" / f"{number} {call.name}"
                names = _purified(call, root, names, target, seed, restart, skip_broken, progress)
                root = target
            root, names = broadcast_object_list([root, names])
            with _of_the_checkpoint():
                result: Personalized = function(
                    model,
                    [root / name for name in names],
                    checkpoint=folder / "training",
                    seed=seed,
                    progress=progress,
                    **settings,
                )
            told = {"prompt": prompt} | result.settings | {"pictures": names, "purifiers": list(purifiers)}
            result = replace(result, settings=told)
            if main:
                _write(result, out, root if calls else None, prompt, samples, seed, progress)
            state.wait_for_everyone()
            if main and checkpoint is None:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()  # where nothing was begun
    return result


def processes() -> PartialState:
    """This process among those that `accelerate launch` or torchrun started.

    The first call of a process sets how long they wait for each other.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=_PATIENCE)


def _checked(method: str, settings: Mapping[str, Any]) -> tuple[Callable[..., Personalized], str]:
    """The method, if it takes the settings, and what its samples are of."""
    if method not in TRAININGS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(TRAININGS)}")
    function: Callable[..., Personalized] = getattr(methods, method)
    known = inspect.signature(function).parameters
    for name in settings:
        if name not in known or name in _OF_THE_JOB:
            raise ValueError(f"{name}: got one, which {method} does not take")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in (*_OF_THE_JOB, *settings):
            raise ValueError(f"{name}: got none, expected one, which {method} needs")
    if method == "textual_inversion":
        return function, f"a photo of {settings['placeholder_token']}"
    for name in ("class_images", "num_class_images"):
        if settings.get(name) is not None and settings.get("class_prompt") is None:
            raise ValueError(f"class_prompt: got none, expected one with {name}")
    check_prompts(settings["prompt"], settings.get("class_prompt"), settings.get("noise_phrase"))
    return function, settings["prompt"]


def _check_apart(checkpoint: Path, out: Path) -> None:
    """Make sure that neither folder is in the way of the other."""
    inner, outer = checkpoint.resolve(), out.resolve()
    if inner.is_relative_to(outer) or any(outer.is_relative_to(inner / part) for part in _PARTS):
        raise ValueError(f"checkpoint: got {str(checkpoint)!r}, expected a folder apart from {str(out)!r}")


def _check_purifiers(names: Sequence[str], given: Mapping[str, Any]) -> None:
    """Make sure that purifiers have the models that they need, and that no other is given."""
    for name in names:
        if name not in PURIFIERS:
            raise ValueError(f"purifiers: got {name!r}, expected some of {', '.join(PURIFIERS)}")
        kind = PURIFIERS[name].model
        if kind is not None and given[kind] is None:
            raise ValueError(f"{kind}: got none, expected one, which {name} needs")
    used = {PURIFIERS[name].model for name in names}
    for other in {"denoiser", "upscaler"} - used:
        if given[other] is not None:
            raise ValueError(f"{other}: got one, expected a purifier that works by it")


def _forget(training: Path) -> None:
    """Throw away what a training has left, and nothing of others.

    Raises:
        ValueError: if what has the name of its file is not its.
    """
    file = training / CHECKPOINT
    if file.exists():
        try:
            with safe_open(file, framework="pt") as tensors:
                is_ours = "training" in (tensors.metadata() or {})
        except (SafetensorError, OSError):
            is_ours = False
        if not is_ours:
            raise ValueError(
                f"checkpoint: {str(file)!r} cannot be read as one of a training, and is not thrown away; "
                "choose another folder, or delete it"
            )
        file.unlink()
    for folder in training.glob("class-" + 12 * "[0-9a-f]"):
        for picture in folder.glob(5 * "[0-9]" + ".png"):
            picture.unlink()
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _of_the_checkpoint() -> Iterator[None]:
    """Inside the block, a folder that is of another job is the checkpoint's, and can be restarted."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = re.sub("^out:", "checkpoint:", str(error))
        if "is of another training" in said:
            said = re.sub("or delete it$", "or restart", said)
        if said == str(error):
            raise
        raise (OSError if isinstance(error, OSError) else ValueError)(said) from error


def _purified(
    call: Call,
    root: Path,
    names: list[str],
    target: Path,
    seed: int,
    restart: bool,
    skip_broken: bool,
    progress: bool,
) -> list[str]:
    """Put the purified pictures into `target`; their names there."""
    with _of_the_checkpoint():
        outcome = work(
            call,
            (root, names, ()),
            target,
            format="png",
            chunk_size=None,
            seed=seed,
            restart=restart,
            progress=progress,
        )
    for line in outcome.lines:
        if line["status"] == "failed":
            reason = f"source: {line['source']!r} cannot be purified by {call.name}: {line['reason']}"
            if not skip_broken:
                raise ValueError(reason)
            warn(f"{reason}; it is left out")
    found = [line["output"] for line in outcome.lines if line["status"] == "done"]
    if not found:
        raise ValueError(f"source: none of its pictures can be purified by {call.name}")
    return found


def _write(
    result: Personalized,
    out: Path,
    purified: Path | None,
    prompt: str,
    samples: int,
    seed: int,
    progress: bool,
) -> None:
    """Everything under a temporary name, and then `out`."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(out):
            result.save(partial)
            if purified is not None:
                (partial / "purified").mkdir()
                for name in result.settings["pictures"]:
                    shutil.copyfile(purified / name, partial / "purified" / name)
        if samples:
            drawn = methods.sample(result, [prompt], num_images=samples, seed=seed, progress=progress)[0]
            titles = [str(number + 1) for number in range(samples)]
            sheet = contact_sheet([list(drawn)], columns=titles, labels=[prompt], picture_px=drawn.shape[-1])
            with writing(out):
                save_lossless(sheet, partial / "samples.png")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
