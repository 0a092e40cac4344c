"""Options that all commands share, the model that they name, and what they write."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:  # importing it takes seconds, which --help should not
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
    import diffusers
    import torch
    import transformers

    from pumice import models, testbed

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        source = testbed.WEIGHTS if model == TESTBED else model
        opened = models.load(source, dtype=getattr(torch, dtype), device=device)
    except ValueError as error:
        raise ValueError(str(error).replace("source:", "--model:", 1)) from error
    opened.pipe.set_progress_bar_config(disable=True)
    return opened


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

    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ErasureWarning)
        yield found
    for warning in caught:
        if not issubclass(warning.category, ErasureWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif str(warning.message) not in found:
            found.append(str(warning.message))
