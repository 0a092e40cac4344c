"""`pumice erase`: take concepts out of a model, and see at once what that does to its pictures."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from .erase_methods import PROMPTS, Method, method_options, training_options
from .options import (
    TESTBED,
    in_options,
    model_options,
    named_as_options,
    open_model,
    output_file,
    printable,
    warnings_of_erasure,
    warnings_shown,
)

if TYPE_CHECKING:  # importing them takes seconds, which --help should not
    from PIL.Image import Image

    from pumice.models import DiffusionModel, Edit

PICTURED = 8  # concepts on the picture
# What the command calls that of which errors and warnings speak.
_NAMES = {"pipe": "--model", "concepts": "CONCEPTS", "sources": "CONCEPTS", "sample_prompts": "--prompt"}
_OF_LORA = {"path": "--lora", "rank": "--rank", "save_single_file": "--single-file"}


@click.command()
@click.argument("concepts", nargs=-1, required=True)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The edit (.safetensors) to write."
)
@method_options
@training_options
@click.option(
    "--lora", type=click.Path(path_type=Path), help="Also write the edit as a LoRA, which needs no pumice."
)
@click.option(
    "--lora-format",
    type=click.Choice(["diffusers", "kohya"]),
    help="By default diffusers; kohya is for A1111 and ComfyUI.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Of the LoRA, at most. By default all of it, without loss; what trained whole weights needs one.",
)
@click.option(
    "--single-file",
    type=click.Path(path_type=Path),
    help="Also write the edited model as one .safetensors checkpoint.",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="What to draw before and after; again for more. By default the concepts, at most 8 of "
    "them, and two other prompts.",
)
@click.option("--no-picture", is_flag=True, help="Draw nothing.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Of the training and the picture.",
)
@click.option(
    "--num-inference-steps",
    default=25,
    show_default=True,
    type=click.IntRange(min=1),
    help="Of the picture's sampler.",
)
@model_options
def erase(
    concepts: tuple[str, ...],
    out: Path,
    *,
    method: str,
    guide: tuple[str, ...],
    concept_type: str | None,
    lora: Path | None,
    lora_format: str | None,
    rank: int | None,
    single_file: Path | None,
    prompts: tuple[str, ...],
    no_picture: bool,
    seed: int,
    num_inference_steps: int,
    model: str,
    dtype: str,
    device: str | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Erase CONCEPTS from a model, in closed form or by training, and draw it before and after.

    Writes the edit, a picture of what it does beside it, and on request a LoRA or a whole model.
    `pumice.models.Edit.load(OUT).apply(pipe)` puts the edit on, `remove` takes it off again.

    Methods that train want concepts as captions word them: "a ball". Several processes share a training under
    `accelerate launch -m pumice.cli erase ...`, or without GPUs under `torchrun -m`.
    """
    from pumice.io import write_whole
    from pumice.jobs.personalize import processes
    from pumice.training.checkpoint import TrainingWarning

    state = processes()
    if state.num_processes > 1 and device is None:
        device = str(state.device)
    quiet = quiet or not state.is_main_process
    chosen = Method(method)
    arguments = chosen.arguments({"guide": guide, "type": concept_type} | given)
    for name, value in (("--lora-format", lora_format), ("--rank", rank)):
        if value is not None and lora is None:
            raise ValueError(f"{name}: got {value} without --lora")
    if lora is not None and rank is None and chosen.trains_weights(arguments):
        raise ValueError(
            f"--lora: got one without --rank; {method} trains whole weights, of which a LoRA is the nearest "
            "of that rank (--train-rank trains one)"
        )
    if prompts and no_picture and given["samples"] is None:
        raise ValueError("--prompt: got one with --no-picture")
    picture = None if no_picture else out.with_suffix(".png")
    _check_outputs(out, picture, lora, single_file, given["key"])
    opened = open_model(model, dtype, device)

    start = time.perf_counter()
    arguments |= chosen.accepted(seed=seed, progress=not quiet)
    if given["samples"] is not None:
        arguments |= chosen.accepted(sample_prompts=prompts)
    names = chosen.flags(("guide", "type", *given)) | _NAMES
    with (
        warnings_of_erasure() as warned,
        warnings_shown(TrainingWarning, hidden=not state.is_main_process),
        named_as_options((), **names),
        _interrupted(_how_to_go_on(chosen, given["checkpoint"]) if state.is_main_process else ""),
    ):
        edit = chosen(opened, concepts, arguments)
    seconds = time.perf_counter() - start
    if not state.is_main_process:
        return
    edit = replace(edit, targets=concepts)  # those of time are prompts
    edit.save(out)
    warned = [in_options(warning, names) for warning in warned]
    with _interrupted(f"the edit is in {str(out)!r}"):
        if picture is not None:
            template = "{}" if chosen.trains else PROMPTS[concept_type or "object"]
            shown = prompts or _prompts(concepts, template, model)
            file = io.BytesIO()
            _before_and_after(opened, edit, shown, seed, num_inference_steps).save(file, "PNG")
            write_whole(picture, file.getvalue())
            click.echo(f"picture: {picture.resolve()}")
        try:
            if lora is not None:
                with warnings_of_erasure() as left_out, named_as_options((), **_OF_LORA):
                    edit.save_lora(lora, opened.pipe, format=lora_format or "diffusers", rank=rank)  # type: ignore[arg-type]
                warned += [in_options(warning, _OF_LORA) for warning in left_out]
            if single_file is not None:
                with named_as_options((), path="--single-file"):
                    edit.save_single_file(single_file, opened.pipe)
        except ValueError as error:
            raise ValueError(f"{error}; the edit is in {str(out)!r}") from error
    if not quiet:
        _print_table(edit, seconds)
    for warning in warned:
        click.echo(f"warning: {printable(warning)}", err=quiet)
    for name, path in (("lora", lora), ("model", single_file), ("key", given["key"]), ("edit", out)):
        if path is not None:
            click.echo(f"{name}: {path.resolve()}")


@contextmanager
def _interrupted(hint: str) -> Iterator[None]:
    """Whoever interrupts the block is told what there is to know, also with --quiet."""
    try:
        yield
    except KeyboardInterrupt:
        if hint:
            click.echo(f"\n{hint}", err=True)
        raise


def _how_to_go_on(method: Method, checkpoint: Path | None) -> str:
    if not method.trains:
        return ""
    return (
        "run the same command again to go on" if checkpoint else "give --checkpoint DIR to be able to go on"
    )


def _check_outputs(
    out: Path, picture: Path | None, lora: Path | None, single_file: Path | None, key: Path | None
) -> None:
    from pumice.io.files import new_file

    named = {"--out": out, "--lora": lora, "--single-file": single_file, "--key": key}
    paths: dict[Path, str] = {}
    for name, path in named.items():
        if path is None:
            continue
        if path.suffix != ".safetensors":
            raise ValueError(f"{name}: got {str(path)!r}, expected a name that ends in .safetensors")
        other = paths.setdefault(path.resolve(), name)
        if other != name:
            raise ValueError(f"{other}, {name}: got {str(path)!r} for both, expected two names")
    for name, path in named.items():
        if path is not None and name != "--out":
            try:
                new_file(path)
            except ValueError as error:
                raise ValueError(str(error).replace("path:", f"{name}:", 1)) from error
    output_file(out, "--out")
    if picture is not None:
        output_file(picture, "--out")
        if picture.exists() and not out.exists():
            raise ValueError(f"--out: {str(picture)!r} is there already, and the picture would replace it")


def _prompts(concepts: Sequence[str], template: str, model: str) -> tuple[str, ...]:
    """Of the concepts, and of two things that should stay."""
    from pumice.erase.edits import HELD_OUT
    from pumice.testbed import world

    others = [PROMPTS["object"].format(name) for name in world.OBJECTS] if model == TESTBED else HELD_OUT
    kept = [text for text in others if not any(concept.casefold() in text.casefold() for concept in concepts)]
    return (*map(template.format, concepts[:PICTURED]), *kept[:2])


def _before_and_after(
    opened: DiffusionModel, edit: Edit, prompts: Sequence[str], seed: int, steps: int
) -> Image:
    import torch

    from pumice.evaluate import contact_sheet
    from pumice.evaluate.drawing import edited, groups
    from pumice.models import RowBudget
    from pumice.models.drawing import draw

    def work(copies: int, rows: int) -> torch.Tensor:
        parts = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
        drawn = [
            draw(
                opened.pipe,
                [seed] * len(part),
                copies,
                prompt=[prompt for prompt in part for _ in range(copies)],
                num_inference_steps=steps,
            )
            for part in parts
        ]
        return torch.cat(drawn, dim=1)

    found = []
    for group in groups({"before": None, "after": edit}, 2):
        with edited(opened, list(group.values())):
            found.append(RowBudget(PICTURED + 2).run(partial(work, len(group))))
    pictures = torch.cat(found).transpose(0, 1)
    return contact_sheet(list(pictures), columns=["before", "after"], labels=prompts)


def _print_table(edit: Edit, seconds: float) -> None:
    found = edit.report()
    lines = {
        "overall change": ("overall_change", "{:.1%} of the weights' norm"),
        "residual": ("residual", "{:.1%} of the way is left"),
        "drift": ("drift", "{:.1%} of other prompts' tokens"),
        "condition number": ("condition_number", "{:.2g}"),
        "rank": ("rank", "{}"),
        "encoder calls": ("encoder_calls", "{}"),
    }
    rows = {title: text.format(found[key]) for title, (key, text) in lines.items() if key in found}
    losses = found.get("losses", {})
    if isinstance(losses, dict):  # trained one after the other
        of = {f"loss of {name}": each for name, each in losses.items()}
    else:
        of = {"loss": losses}
    for title, each in of.items():
        tenth = -(-len(each) // 10)
        rows["steps"] = str(len(each))
        rows[printable(title)] = f"{fmean(each[:tenth]):.4g} at first, {fmean(each[-tenth:]):.4g} at last"
    for name, value in {**rows, "seconds": f"{seconds:.2f}"}.items():
        click.echo(f"{name:<16}  {value}")
