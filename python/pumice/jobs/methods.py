"""A method with its models and settings, as jobs run it over many pictures."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from PIL import Image
from torch import Tensor

from pumice.io import Picture
from pumice.models.arguments import checked_count

from . import networks
from .manifest import digest

CHUNK = 8  # pictures of a call on a GPU
_OF_THE_JOB = ("images", "seed", "progress", "mask", "timesteps")  # the last two are a picture's own
_NOT_OF_THE_RESULT = ("batch_size", "recompute")
_PICTURES = ("target", "clean_images", "class_images")  # where a string is a file


@dataclass(frozen=True)
class Method:
    """A method as a job runs it.

    Attributes:
        function: of `pumice.protect`, `pumice.purify` or, without a model, `pumice.purify.filters`.
        model: the argument that what it works by goes to, a `networks.Kind`; None if there is none.
        per_subject: whether pictures are optimised together, and a folder is so the least that can be done.
    """

    function: str
    model: networks.Kind | None = "pipe"
    per_subject: bool = False


class Call:
    """A method with its models and settings.

    Args:
        name: that errors speak of.
        method: of a table.
        function: the method itself.
        model: what it works by, or several of these.
        settings: of the method.
        progress: whether the method shows a bar of its own, where one of pictures stands still for long.

    Attributes:
        name, method: as given.
        models: that it works by.
        effective: settings, and the method's defaults of all others.
        chunk_size: by default.
        levels: how many of 255 a value may change, None without such a budget.
    """

    levels: int | None = None

    def __init__(
        self,
        name: str,
        method: Method,
        function: Callable[..., Any],
        model: Any,
        settings: Mapping[str, Any],
        *,
        progress: bool,
    ) -> None:
        self.name, self.method, self._function, self._settings = name, method, function, dict(settings)
        known = dict(inspect.signature(function).parameters)
        options = _options(function) if known.pop("options", None) else ()
        taken = {*known, *options}
        of_the_job, kind = (*_OF_THE_JOB, method.model), method.model
        for each in settings:
            if each not in taken or each in of_the_job:
                raise ValueError(f"{each}: got one, which {name} does not take")
        for each, parameter in known.items():
            if parameter.default is parameter.empty and each not in (*of_the_job, *settings):
                raise ValueError(f"{each}: got none, expected one, which {name} needs")
        if method.per_subject and "progress" in taken:  # the bar over pictures stands still for long
            self._settings["progress"] = progress
        for each in get_args(networks.Kind):  # a second model, where there is one
            if self._settings.get(each) is not None:
                self._settings[each] = networks.load(each, self._settings[each])
        defaults = {each: parameter.default for each, parameter in known.items()}
        defaults = {each: value for each, value in defaults.items() if value is not inspect.Parameter.empty}
        self.effective = ({"size": "resize"} if "size" in options else {}) | defaults | self._settings
        self._seeded = "seed" in taken

        several = isinstance(model, list | tuple)
        given = list(model) if several else [model]
        self.models = [networks.load(kind, each) for each in given] if kind else []
        self._model = [self.models if several else self.models[0]] if kind else []
        on_gpu = any(networks.device(each).type == "cuda" for each in self.models)
        batch_size = settings.get("batch_size")
        usual = CHUNK if on_gpu else 1
        self.chunk_size = usual if batch_size is None else checked_count("batch_size", batch_size)

    def described(self) -> dict[str, Any]:
        """All that the results depend on, as JSON."""
        told = {
            name: _described(name, value)
            for name, value in self.effective.items()
            if name not in (*_OF_THE_JOB, *_NOT_OF_THE_RESULT)
        }
        return told | {"model": networks.told(*self.models)}

    def open(self, path: Path) -> Picture:
        """A picture that the method can work on.

        Raises:
            ValueError: for one that cannot be read, or has no form that the models take.
        """
        return Picture.open(path)

    def __call__(self, pictures: Sequence[Picture], seeds: Sequence[int]) -> list[Image.Image]:
        images = [picture.with_pixels(picture.pixels) for picture in pictures]
        seeded = {"seed": list(seeds)} if self._seeded else {}
        result: list[Image.Image] = self._function(images, *self._model, **seeded, **self._settings)
        return result


def _options(function: Callable[..., Any]) -> Collection[str]:
    """The names in the TypedDict of `**options`."""
    (options,) = get_args(get_type_hints(function)["options"])
    return get_type_hints(options).keys()


def _described(name: str, value: Any) -> Any:
    """What tells a setting from others, as JSON, in this process and in any other."""
    if name in get_args(networks.Kind) and value is not None:
        return networks.told(value)
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
