"""Options that several commands share, and the model that they name."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # importing them takes seconds, which --help should not
    from pumice.memorization.metric import Metric
    from pumice.models import DiffusionModel

TESTBED = "testbed"
METRICS = ("magnitude", "anisotropy", "sharpness", "attention_entropy", "bright_ending")
GUARDS = ("embedding", "dynamic_guidance", "initial_noise", "attention_rescaling", "refuse")


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

score_options = options(
    click.option("--metric", type=click.Choice(METRICS), help="By default magnitude."),
    click.option(
        "--steps",
        type=click.IntRange(min=1),
        help="Denoising steps that magnitude and sharpness look at, by default 1.",
    ),
    click.option("--seeds", type=click.IntRange(min=1), help="Initial noises a prompt, by default 4."),
    click.option("--num-inference-steps", type=click.IntRange(min=1), help="Of the sampler, by default 50."),
    click.option(
        "--guidance-scale", type=float, help="Of the sampler, from its second step on, by default 7.5."
    ),
    click.option(
        "--height", type=click.IntRange(min=1), help="Of the pictures, in px; by default the model's."
    ),
    click.option(
        "--width", type=click.IntRange(min=1), help="Of the pictures, in px; by default the model's."
    ),
    click.option(
        "--batch-size",
        default=32,
        show_default=True,
        type=click.IntRange(min=1),
        help="Rows in a call of the denoiser.",
    ),
)


def chosen_metric(metric: str | None, steps: int | None) -> Metric | str | None:
    """The metric of --metric and --steps; None leaves it to the calibration."""
    from pumice.memorization import Magnitude, Sharpness

    if steps is None:
        return metric
    kinds: dict[str | None, Any] = {None: Magnitude, "magnitude": Magnitude, "sharpness": Sharpness}
    if metric not in kinds:
        raise ValueError(f"--steps: got {steps}, which {metric} does not take")
    return kinds[metric](steps=steps)


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


def printable(text: str) -> str:
    """Without terminal escapes, which a list of prompts may have."""
    return "".join(character if character.isprintable() else " " for character in text)
