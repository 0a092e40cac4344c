"""Options that all commands share, the model that they name, and what they write."""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:  # importing them takes seconds, which --help should not
    from pumice.jobs.networks import Kind
    from pumice.models import DiffusionModel

TESTBED = "testbed"
T = TypeVar("T")


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several decorators as one, in the order in which --help shows them."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def number(text: str) -> float:
    """In the unit of pictures, as people write it."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise click.BadParameter(f"got {text!r}, expected a number such as 8/255 or 0.03") from error
    if not 0 <= value <= 1:
        hint = f", in the unit of pictures: {text}/255?" if value > 1 else ""
        raise click.BadParameter(f"got {text}, expected 0 to 1{hint}")
    return value


folder_options = options(
    click.option(
        "--format",
        default="png",
        show_default=True,
        type=click.Choice(["png", "webp"]),
        help="Of what is written, both without loss.",
    ),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0)),
    click.option("--restart", is_flag=True, help="Throw away what OUT has of an earlier job."),
)

model_options = options(
    click.option(
        "--model",
        default=TESTBED,
        show_default=True,
        help="A diffusers folder, a .safetensors checkpoint or a hub id.",
    ),
    click.option(
        "--dtype", default="float32", show_default=True, type=click.Choice(["float32", "float16", "bfloat16"])
    ),
    click.option("--device", help="By default a GPU if there is one."),
    click.option("--quiet", is_flag=True, help="No progress bars and no table."),
)


def open_model(model: str, dtype: str, device: str | None) -> DiffusionModel:
    """The model of --model, --dtype and --device, without progress bars of the libraries."""
    from pumice import models, testbed

    place = _quiet_place(dtype, device)
    try:
        opened = models.load(testbed.WEIGHTS if model == TESTBED else model, **place)
    except ValueError as error:
        raise ValueError(str(error).replace("source:", "--model:", 1)) from error
    opened.pipe.set_progress_bar_config(disable=True)
    return opened


def open_purifier(kind: Kind, model: str, dtype: str, device: str | None) -> Any:
    """What a purifier works by, as `open_model` opens a pipeline."""
    from pumice import testbed
    from pumice.jobs import networks

    if kind == "pipe":
        return open_model(model, dtype, device)
    place = _quiet_place(dtype, device)
    if model == TESTBED:
        return (testbed.load_denoiser() if kind == "denoiser" else testbed.load_upscaler()).to(**place)
    return networks.load(kind, model, **place)


def _quiet_place(dtype: str, device: str | None) -> dict[str, Any]:
    """The dtype and device of --dtype and --device, and the libraries without progress bars."""
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {"dtype": getattr(torch, dtype), "device": device}


def run_details(model: str, opened: DiffusionModel, **settings: Any) -> dict[str, Any]:
    """What a report tells of its run."""
    import torch

    import pumice

    return {
        "model": model,
        **{name.replace("_", " "): value for name, value in settings.items() if value is not None},
        "dtype": str(opened.dtype).removeprefix("torch."),
        "device": str(opened.device),
        "pumice": pumice.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def output_file(path: Path, name: str) -> None:
    """Refuse a file that could not be written, before the work and not after it."""
    from pumice.io import check_writable

    if path.is_dir():
        raise ValueError(f"{name}: {str(path)!r} is a folder, expected a file")
    check_writable(path.resolve().parent, name)


def read_list(read: Callable[[Path], T], path: Path, name: str) -> T:
    """What a reader of lists makes of a file, its errors named as the option that the file came from."""
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(str(error).replace("prompts:", f"{name}:", 1)) from error


def printable(text: str) -> str:
    """Without terminal escapes, which a list of prompts may have."""
    return "".join(character if character.isprintable() else " " for character in text)


@contextmanager
def warnings_of_erasure() -> Iterator[list[str]]:
    """What erasers and their judges warn of inside the block, each once, for the screen; others as ever."""
    from pumice.erase import ErasureWarning
    from pumice.models import EditWarning

    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        for kind in (ErasureWarning, EditWarning):
            warnings.simplefilter("always", kind)
        yield found
    for warning in caught:
        if not issubclass(warning.category, (ErasureWarning, EditWarning)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif str(warning.message) not in found:
            found.append(str(warning.message))


@contextmanager
def named_as_options(given: Iterable[str], **others: str) -> Iterator[None]:
    """Errors speak of the options that arguments came from."""
    names = {"source": "IN", "images": "IN", "out": "OUT"}
    names |= {name: f"--{name.replace('_', '-')}" for name in ("device", "dtype", *given)} | others
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        message = in_options(str(error), names)
        raise ValueError(re.sub(", or restart$", ", or --restart", message)) from error


def in_options(message: str, names: Mapping[str, str]) -> str:
    """What a function says of its arguments, in the names that the command has for them."""

    def named(found: re.Match[str]) -> str:
        return names.get(found["name"] or "", found[0])

    def set_to(found: re.Match[str]) -> str:
        if found[1] not in names:
            return found[0]
        return names[found[1]] if found[2] else f"{names[found[1]]} "

    def each_named(found: re.Match[str]) -> str:
        return ", ".join(names.get(name, name) for name in found[0].split(", "))

    message = re.sub(r"^\w+(, \w+)*(?=(\[\d+\])?:)", each_named, message)
    message = re.sub(r"\b(\w+)=(?:(?=')|(True\b))", set_to, message)
    # further on, what is not quoted and cannot be a word of a sentence
    return re.sub(r"(?<!\w)'[^']*'|(?<![\w/-])(?P<name>[a-z]+(_[a-z]+)+)\b", named, message)


def refuse_given(names: Iterable[str], method: str) -> None:
    """Refuse options that were given to a command, though their defaults do no harm."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise ValueError(f"{name}: got {context.params[name]!r}, which {method} does not take")


@contextmanager
def warnings_shown(kind: type[Warning], *, hidden: bool = False) -> Iterator[None]:
    """Warnings of a kind, each once and without a line of code; or not at all."""
    shown: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, kind):
                show(message, category, *where, **more)
            elif not hidden and str(message) not in shown:
                shown.add(str(message))
                click.echo(f"warning: {printable(str(message))}", err=True)

        warnings.showwarning = tell
        warnings.simplefilter("always", kind)
        yield
