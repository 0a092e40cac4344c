"""`pumice protect`: a folder of pictures, so changed that models cannot learn them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    TESTBED,
    folder_options,
    model_options,
    named_as_options,
    number,
    open_model,
    options,
    warnings_shown,
)
from .outcome import FAILED, print_failures, print_table

if TYPE_CHECKING:  # importing it takes seconds, which --help should not
    from pumice.models import DiffusionModel

METHODS = (
    "ace",
    "advdm",
    "aspl",
    "caat",
    "easpl",
    "fsmg",
    "glaze",
    "metacloak",
    "mist",
    "photoguard",
    "photoguard_diffusion",
    "random",
    "sds",
    "sdst",
    "simac",
)
FIXED = {"photoguard_diffusion": {"norm": "linf"}}  # --eps is the largest change with every method


method_options = options(
    click.option("--method", default="mist", show_default=True, type=click.Choice(METHODS)),
    click.option(
        "--eps", type=number, help="Largest change of a value, such as 8/255. By default the paper's."
    ),
    click.option("--steps", type=click.IntRange(min=1), help="By default the paper's."),
    click.option("--step-size", type=number, help="In the unit of --eps. By default the paper's."),
    click.option("--prompt", help="What the pictures are called. By default the paper's."),
    click.option(
        "--target", type=click.Path(path_type=Path), help="A picture that the latents are drawn to."
    ),
    click.option("--style", help="A style that the latents are drawn to, for glaze."),
    click.option("--class-prompt", help="What the subject is one of, for methods that train a surrogate."),
    click.option("--num-class-images", type=click.IntRange(min=1), help="Of the class, drawn by the model."),
    click.option(
        "--surrogate",
        type=click.Choice(["fp32_master", "bf16_faithful", "lora"]),
        help="What of it is trained. By default fp32_master, all weights; lora takes far less memory.",
    ),
    click.option(
        "--train-steps", type=click.IntRange(min=0), help="Of the surrogate, for fsmg and metacloak."
    ),
    click.option("--max-train-steps", type=click.IntRange(min=1), help="Rounds of aspl, easpl and simac."),
    click.option(
        "--size",
        type=click.Choice(["resize", "tiles", "native"]),
        help="How pictures of any size meet the model. By default resize; the result has their own size.",
    ),
    click.option(
        "--batch-size", type=click.IntRange(min=1), help="Pictures of a pass. By default what fits."
    ),
    click.option("--vram", help="Memory to keep within, such as 8GB: chooses --batch-size and more."),
)


@click.command()
@click.argument("source", metavar="IN", type=click.Path(exists=True, path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@method_options
@folder_options
@model_options
def protect(
    source: Path,
    out: Path,
    *,
    method: str,
    vram: str | None,
    format: str,
    seed: int,
    restart: bool,
    model: str,
    dtype: str,
    device: str | None,
    quiet: bool,
    **given: Any,
) -> int:
    """Protect the pictures of a folder, or one picture, against being learned by a model.

    OUT gets the same folders and names with lossless pictures, and manifest.jsonl, which says what became of
    each. Interrupted, the same command goes on where it stopped; later, it does what is new or changed.
    Methods that optimise pictures together take each folder for one subject.
    """
    from pumice import jobs
    from pumice.jobs import folders
    from pumice.protect import ProtectionWarning

    settings = FIXED.get(method, {}) | {name: value for name, value in given.items() if value is not None}
    with named_as_options(given, vram="--vram"), warnings_shown(ProtectionWarning):
        root, names, _ = folders.pictures(source, out)  # before the model, which takes a while
        opened = None if method == "random" else open_model(model, dtype, device)
        if vram is not None:
            sizes = folders.sizes(root, names)
            settings = _planned(opened, method, vram, settings, sizes, quiet) | settings
        found = jobs.protect(
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
            "note: the embedded model is for trying out; name the one to protect against: --model", err=True
        )
    click.echo(f"manifest: {found.manifest.resolve()}")
    return FAILED if found.failed else 0


def _planned(
    opened: DiffusionModel | None,
    method: str,
    vram: str,
    settings: dict[str, Any],
    sizes: Iterable[tuple[int, int]],
    quiet: bool,
) -> dict[str, Any]:
    """What keeps the method within the memory, whichever of the pictures it is at."""
    from pumice.protect.plan import plan

    size = settings.get("size", "resize")
    if size == "native":
        raise ValueError(f"vram: got {vram}, which --size native cannot be kept within")
    height, width = _largest(opened, sizes) if opened is not None and size == "resize" else (None, None)
    try:
        planned = plan(
            opened, method, vram, height, width, surrogate=settings.get("surrogate", "fp32_master")
        )
    except ValueError as error:
        if str(error).startswith("task:"):
            raise ValueError(f"vram: got {vram}, which {method} does not take") from error
        raise
    if not planned.fits:
        raise ValueError(f"vram: got {vram}, which is too little: {planned}")
    if not quiet:
        click.echo(str(planned))
    return {"batch_size": planned.batch_size, "recompute": planned.recompute}


def _largest(opened: DiffusionModel, sizes: Iterable[tuple[int, int]]) -> tuple[int, int] | tuple[None, None]:
    """Of the sizes that pictures are resized to."""
    from pumice.protect.fitting import LONGEST, Resized, fit

    found = [
        fit(height, width, [opened], "resize")
        for height, width in set(sizes)
        if max(height, width) <= LONGEST * min(height, width)
    ]
    working = [each.working for each in found if isinstance(each, Resized)]
    return max(working, key=lambda size: size[0] * size[1]) if working else (None, None)
