"""The methods that jobs know, and one of them with its models and settings."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from PIL import Image
from torch import Tensor

from pumice import models
from pumice import protect as methods
from pumice.io import Picture
from pumice.models.arguments import check_budget, checked_count
from pumice.protect.fitting import fit

from .manifest import digest

CHUNK = 8  # pictures of a call on a GPU
_OF_THE_JOB = ("images", "pipe", "seed", "progress", "mask", "timesteps")  # the last two are a picture's own
_NOT_OF_THE_RESULT = ("batch_size", "recompute")
_PICTURES = ("target", "clean_images", "class_images")  # where a string is a file


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


class Call:
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
        weights = [
            (models.fingerprint(each), models.drawing_state(each)["vae"], each.schedule.config)
            for each in self._models
        ]
        told = {
            name: _described(name, value)
            for name, value in self._effective.items()
            if name not in (*_OF_THE_JOB, *_NOT_OF_THE_RESULT)
        }
        return told | {"model": hashlib.sha256(repr(weights).encode()).hexdigest()[:16]}

    def open(self, path: Path) -> Picture:
        """A picture that the method can work on.

        Raises:
            ValueError: for one that cannot be read, or has no form that the models take.
        """
        picture = Picture.open(path)
        if self._models and "size" in self._effective:
            _, height, width = picture.pixels.shape
            fit(height, width, self._models, self._effective["size"])
        return picture

    def __call__(self, pictures: Sequence[Picture], seeds: Sequence[int]) -> list[Image.Image]:
        images = [picture.with_pixels(picture.pixels) for picture in pictures]
        result: list[Image.Image] = self._function(images, *self._pipe, seed=list(seeds), **self._settings)
        return result


def _options(function: Callable[..., Any]) -> Collection[str]:
    """The names in the TypedDict of `**options`."""
    (options,) = get_args(get_type_hints(function)["options"])
    return get_type_hints(options).keys()


def _described(name: str, value: Any) -> Any:
    """What tells a setting from others, as JSON, in this process and in any other."""
    if isinstance(value, PathLike) or (isinstance(value, str) and name in _PICTURES):
        return digest(Path(value)) or str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Real):  # of NumPy
        return float(value)
    if isinstance(value, list | tuple):
        return [_described(name, each) for each in value]
    if isinstance(value, Image.Image):
        return hashlib.sha256(f"{value.mode} {value.size}".encode() + value.tobytes()).hexdigest()
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + content).hexdigest()
    function = getattr(value, "__qualname__", None)
    told = repr(value) if function is None else f"{value.__module__}.{function}"  # or like a dataclass
    if "<locals>" in told or "<lambda>" in told or " at 0x" in told:
        raise ValueError(f"{name}: got {told}, expected a function with a name of its own")
    return told
