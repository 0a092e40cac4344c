"""`pumice personalize`: from a folder of pictures to a model that has learned them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    TESTBED,
    model_options,
    named_as_options,
    open_model,
    open_purifier,
    options,
    printable,
    warnings_shown,
)

if TYPE_CHECKING:  # importing it takes seconds, which --help should not
    from pumice.jobs.networks import Kind
    from pumice.personalize import Personalized

MODES = {"full": "fp32_master", "lora": "lora", "bf16_faithful": "bf16_faithful"}

method_options = options(
    click.option(
        "--method",
        default="dreambooth",
        show_default=True,
        type=click.Choice(["dreambooth", "textual_inversion"]),
    ),
    click.option("--prompt", help='What the pictures are called, such as "a photo of sks person".'),
    click.option("--class-prompt", help='What the subject is one of, such as "a photo of person".'),
    click.option(
        "--class-images",
        type=click.Path(exists=True, path_type=Path),
        help="A folder of pictures of the class. By default the model draws them.",
    ),
    click.option("--num-class-images", type=click.IntRange(min=1), help="How many the model draws."),
    click.option(
        "--mode",
        type=click.Choice(list(MODES)),
        help="What is trained. By default full, all weights; lora is small and takes far less memory.",
    ),
    click.option("--placeholder-token", help="The new word, for textual_inversion."),
    click.option("--initializer-token", help="A word that it starts from."),
    click.option("--num-vectors", type=click.IntRange(min=1), help="Of the new word."),
    click.option(
        "--purify",
        metavar="METHOD[,METHOD...]",
        help="Clean the pictures first, by methods of `pumice purify` with their defaults.",
    ),
    click.option("--denoiser", help="The model of purifiers in pixels, such as gridpure."),
    click.option("--upscaler", help="The model of purifiers that upscale, such as noisy_upscaling."),
    click.option(
        "--decouple",
        is_flag=True,
        help='Learn the noise of protected pictures as "bhj noisy pattern", which samples then go without. '
        "Needs --class-prompt.",
    ),
    click.option("--noise-phrase", help="A phrase in its place. Implies --decouple."),
    click.option("--steps", type=click.IntRange(min=1), help="By default the paper's."),
    click.option("--learning-rate", type=float, help="By default the paper's."),
    click.option("--batch-size", type=click.IntRange(min=1), help="Pictures of a step. By default 1."),
    click.option("--rank", type=click.IntRange(min=1), help="Of lora. By default 4."),
    click.option(
        "--train-text-encoder/--no-train-text-encoder", default=None, help="By default it learns, too."
    ),
)


@click.command()
@click.argument("source", metavar="IN", type=click.Path(exists=True, path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@method_options
@click.option(
    "--samples",
    default=4,
    show_default=True,
    type=click.IntRange(min=0),
    help="Pictures of OUT/samples.png.",
)
@click.option("--skip-broken", is_flag=True, help="Leave out pictures that cannot be read.")
@click.option(
    "--checkpoint",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder to go on from. By default a hidden one beside OUT, which goes when OUT is there.",
)
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Steps. By default 100.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--restart", is_flag=True, help="Throw away what an interrupted call has left.")
@model_options
def personalize(
    source: Path,
    out: Path,
    *,
    method: str,
    mode: str | None,
    purify: str | None,
    denoiser: str | None,
    upscaler: str | None,
    decouple: bool,
    noise_phrase: str | None,
    samples: int,
    skip_broken: bool,
    checkpoint: Path | None,
    seed: int,
    restart: bool,
    model: str,
    dtype: str,
    device: str | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Personalize a model: learn the subject of the pictures in a folder, and not the noise in them.

    IN is the folder of one subject, or one picture. OUT, a new folder, gets what plain diffusers loads: a
    pipeline, with --mode lora a LoRA, with --method textual_inversion embeddings; and samples.png, drawn from
    it. Interrupted, the same command goes on where it stopped. Several processes share the training under
    `accelerate launch -m pumice.cli personalize ...`, or without GPUs under `torchrun -m`.
    """
    from pumice import jobs
    from pumice.jobs.personalize import processes
    from pumice.personalize import NOISE_PHRASE, PersonalizationWarning

    state = processes()
    quiet = quiet or not state.is_main_process
    if state.num_processes > 1 and device is None:
        device = str(state.device)
    only_decoupled = decouple and noise_phrase is None
    given |= {
        "mode": MODES[mode] if mode else None,
        "noise_phrase": NOISE_PHRASE if only_decoupled else noise_phrase,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    purifiers = [name.strip() for name in purify.split(",")] if purify is not None else []
    with (
        named_as_options(
            (*given, "denoiser", "upscaler", "checkpoint"),
            purifiers="--purify",
            pipe="--model",
            **({"noise_phrase": "--decouple"} if only_decoupled else {}),
        ),
        warnings_shown(PersonalizationWarning, hidden=not state.is_main_process),
    ):
        if given["rank"] is not None and mode != "lora":
            raise ValueError(f"rank: got {given['rank']}, which is of --mode lora")
        models = _purifiers_models(
            purifiers, {"denoiser": denoiser, "upscaler": upscaler}, model, dtype, device
        )
        result = jobs.personalize(
            lambda: open_model(model, dtype, device),  # what is wrong with others is said before
            source,
            out,
            method,
            purifiers=purifiers,
            **models,
            samples=samples,
            skip_broken=skip_broken,
            checkpoint=checkpoint,
            restart=restart,
            seed=seed,
            progress=not quiet,
            **settings,
        )
    if state.is_main_process:
        _print(result, out, samples, quiet, model)


def _purifiers_models(
    purifiers: list[str], given: dict[Kind, str | None], model: str, dtype: str, device: str | None
) -> dict[str, Any]:
    """What purifiers work by; the embedded ones are for the embedded model's pictures alone."""
    from pumice import jobs

    kinds = {jobs.PURIFIERS[name].model for name in purifiers if name in jobs.PURIFIERS}
    usual = TESTBED if model == TESTBED else None
    named = {kind: usual if name is None and kind in kinds else name for kind, name in given.items()}

    def opener(kind: Kind, name: str) -> Callable[[], Any]:
        return lambda: open_purifier(kind, name, dtype, device)

    return {kind: opener(kind, name) for kind, name in named.items() if name is not None}


def _print(result: Personalized, out: Path, samples: int, quiet: bool, model: str) -> None:
    from pumice.personalize import NEGATIVE_PROMPT
    from pumice.personalize.decoupling import without_noise

    settings, losses = result.settings, result.losses
    if not quiet:
        tenth = -(-len(losses) // 10)
        purified = f", purified by {', '.join(settings['purifiers'])}" if settings["purifiers"] else ""
        rows = [
            ("pictures", f"{len(settings['pictures'])}{purified}"),
            ("steps", str(len(losses))),
            ("loss", f"{losses[:tenth].mean():.4f} at first, {losses[-tenth:].mean():.4f} at last"),
            ("draw with", without_noise(settings["prompt"], result.noise_phrase)),
            ("and against", NEGATIVE_PROMPT),
        ]
        if samples:
            rows.append(("samples", str(out / "samples.png")))
        for name, value in rows:
            click.echo(f"{name:<14}  {printable(value)}")
    if model == TESTBED:
        click.echo("note: the embedded model is for trying out; name the one to learn: --model", err=True)
    click.echo(f"model: {out.resolve()}")
