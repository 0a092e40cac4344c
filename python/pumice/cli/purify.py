"""`pumice purify`: a folder of pictures, cleaned of what keeps models from learning them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import (
    TESTBED,
    folder_options,
    model_options,
    named_as_options,
    number,
    open_purifier,
    options,
    refuse_given,
    warnings_shown,
)
from .outcome import FAILED, print_failures, print_table

METHODS = (
    "adverse_cleaner",
    "bilateral",
    "bit_depth",
    "codesr",
    "compress_and_resize",
    "ddspure",
    "diffpure",
    "gaussian",
    "gridpure",
    "guided",
    "impress",
    "jpeg",
    "latent_diffpure",
    "median",
    "noisy_upscaling",
    "pdm_pure",
    "resize",
    "total_variation",
    "tvm",
)
OPTIMIZED = ("impress",)  # whose --steps are of an optimizer, not of a sampler


def size(text: str) -> str | int:
    """Pixels, or how pictures meet the model."""
    if text in ("resize", "native"):
        return text
    if not text.isdecimal():
        raise click.BadParameter(f"got {text!r}, expected resize, native or pixels such as 3")
    return int(text)


method_options = options(
    click.option("--method", default="gridpure", show_default=True, type=click.Choice(METHODS)),
    click.option(
        "--t",
        type=click.IntRange(min=1),
        help="How much noise pictures get before it is removed: steps of the schedule, of mostly 1000.",
    ),
    click.option("--iterations", type=click.IntRange(min=1), help="Rounds."),
    click.option("--gamma", type=float, help="Of the picture before a round that stays in it, for gridpure."),
    click.option("--sampler", type=click.Choice(["ddpm", "dpmsolver++", "one_shot"]), help="The way back."),
    click.option("--steps", type=click.IntRange(min=1), help="Of a sampler, or of impress' optimizer."),
    click.option("--variant", help="Of the method, as its documentation names them."),
    click.option("--eps", type=number, help="The perturbation's, for ddspure; the regulariser of guided."),
    click.option("--prompt", help="What the pictures are called."),
    click.option("--guidance-scale", type=float, help="Towards the prompt."),
    click.option("--noise-level", type=click.IntRange(min=0), help="That the upscaler is told of."),
    click.option(
        "--noise",
        type=number,
        help="Standard deviation that is added first, such as 0.1; for noisy_upscaling and impress.",
    ),
    click.option("--learning-rate", type=float, help="Of impress."),
    click.option("--size", type=size, help="resize or native, for a model; pixels, for filters."),
    click.option("--quality", type=click.IntRange(1, 100), help="Of jpeg."),
    click.option("--sigma", type=float, help="Of gaussian, in pixels."),
    click.option("--radius", type=click.IntRange(min=1), help="Of guided, in pixels."),
    click.option("--bits", type=click.IntRange(1, 8), help="A channel, for bit_depth."),
    click.option("--weight", type=float, help="Of total_variation."),
    click.option(
        "--scale",
        type=float,
        help="What sides are multiplied by on the way, such as 0.5; for resize and compress_and_resize.",
    ),
    click.option("--upscaler", help=f"A second model, for pdm_pure: a diffusers folder, or {TESTBED}."),
    click.option("--batch-size", type=click.IntRange(min=1), help="Rows of a pass. By default what fits."),
)


@click.command()
@click.argument("source", metavar="IN", type=click.Path(exists=True, path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@method_options
@folder_options
@click.option(
    "--backend",
    default="torch",
    show_default=True,
    type=click.Choice(["torch", "onnxruntime"]),
    help="What runs a denoiser or a text-to-image model.",
)
@model_options
def purify(
    source: Path,
    out: Path,
    *,
    method: str,
    steps: int | None,
    upscaler: str | None,
    format: str,
    seed: int,
    restart: bool,
    backend: str,
    model: str,
    dtype: str,
    device: str | None,
    quiet: bool,
    **given: Any,
) -> int:
    """Purify the pictures of a folder, or one picture, of what keeps models from learning them.

    --model is what the method works by: a denoiser of pixels for gridpure, diffpure, ddspure and pdm_pure, a
    text-to-image model for latent_diffpure and impress, an upscaler for noisy_upscaling and codesr. The other
    methods are filters. All settings are by default the papers'.

    OUT gets the same folders and names with lossless pictures, and manifest.jsonl, which says what became of
    each. Interrupted, the same command goes on where it stopped; later, it does what is new or changed.
    """
    from pumice import jobs, models
    from pumice.jobs import folders

    of_steps = "steps" if method in OPTIMIZED else "num_inference_steps"
    settings = {name: value for name, value in (given | {of_steps: steps}).items() if value is not None}
    kind = jobs.PURIFIERS[method].model
    with named_as_options(
        (*given, "upscaler", "backend", "model"),
        **{of_steps: "--steps"},
        **({kind: "--model"} if kind else {}),
    ):
        if kind is None:
            refuse_given(("model", "dtype", "device", "backend"), method)
            if isinstance(given["size"], str):
                raise ValueError(f"size: got {given['size']!r}, expected pixels such as 3 for {method}")
        if backend != "torch" and (kind == "upscaler" or method in OPTIMIZED):
            raise ValueError(f"backend: got {backend}, which {method} does not take")
        folders.pictures(source, out)  # before the model, which takes a while
        opened = None if kind is None else open_purifier(kind, model, dtype, device)
        if backend != "torch":
            load = models.load if kind == "pipe" else models.load_denoiser
            opened = load(opened, backend=backend)  # type: ignore[arg-type]
        if upscaler is not None:
            settings["upscaler"] = open_purifier("upscaler", upscaler, dtype, device)
        with warnings_shown(UserWarning):
            found = jobs.purify(
                opened,
                source,
                out,
                method,
                format=format,  # type: ignore[arg-type]
                seed=seed,
                restart=restart,
                progress=not quiet,
                **settings,
            )
    if not quiet:
        print_table(found)
    print_failures(found)
    if opened is not None and model == TESTBED:
        click.echo(
            "note: the embedded model is for trying out; name one of such pictures as yours: --model",
            err=True,
        )
    click.echo(f"manifest: {found.manifest.resolve()}")
    return FAILED if found.failed else 0
