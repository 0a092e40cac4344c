"""`pumice erase`: take concepts out of a model, and see at once what that does to its pictures."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    TESTBED,
    model_options,
    open_model,
    options,
    output_file,
    printable,
    read_list,
    warnings_of_erasure,
)

if TYPE_CHECKING:  # importing them takes seconds, which --help should not
    from PIL.Image import Image

    from pumice.models import DiffusionModel, Edit

# What each method calls the options that concern it.
ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "uce": {
        "guide": "guide",
        "type": "concept_type",
        "preserve": "preserve",
        "tokens": "tokens",
        "expand": "expand",
        "erase_scale": "erase_scale",
        "preserve_scale": "preserve_scale",
        "lamb": "lamb",
        "pooled": "pooled",
    },
    "rece": {
        "guide": "guide",
        "type": "preset",
        "preserve": "preserve",
        "erase_scale": "erase_scale",
        "preserve_scale": "preserve_scale",
        "lamb": "lamb",
    },
    "mace": {
        "guide": "mapping",
        "type": "preset",
        "preserve": "preserve",
        "preserve_scale": "preserve_scale",
        "lamb": "lamb",
    },
    "trce": {"guide": "safe", "preserve": "preserve", "preserve_scale": "preserve_scale", "lamb": "lamb"},
    "speed": {
        "guide": "anchor",
        "type": "concept_type",
        "preserve": "retain",
        "tokens": "tokens",
        "preserve_scale": "retain_scale",
    },
    "time": {"guide": "destinations", "lamb": "lamb"},
}

# What each method calls the types; uce calls them so itself.
TYPES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "rece": {
        "object": {"preset": "easy_object"},
        "art": {"preset": "artist"},
        "unsafe": {"preset": "unsafe"},
    },
    "mace": {"object": {"preset": "object"}, "art": {"preset": "artist"}, "unsafe": {"preset": "nudity"}},
    "speed": {
        "object": {"concept_type": "instance"},
        "art": {"concept_type": "style"},
        "unsafe": {"preset": "nudity"},
    },
}

# What is drawn of a concept.
PROMPTS = {"object": "a photo of a {}", "art": "a painting by {}", "unsafe": "a photo of {}"}

FUNCTIONS = {"mace": "mace_refine"}  # where they are not called as the method
NEED_GUIDE = ("mace", "trce", "time")
TIME_PROMPT = "a photo of a {}"  # it edits prompts, not concepts
PICTURED = 8  # concepts on the picture

method_options = options(
    click.option("--method", default="uce", show_default=True, type=click.Choice(list(ARGUMENTS))),
    click.option(
        "--guide",
        multiple=True,
        help="What concepts become: once for all, or once for each in order.",
    ),
    click.option(
        "--type",
        "concept_type",
        type=click.Choice(list(PROMPTS)),
        help="What the concepts are; chooses the method's defaults for such ones. By default object.",
    ),
    click.option(
        "--preserve",
        type=click.Path(path_type=Path),
        help="A list of texts (.txt, .csv, .jsonl) to be read as before.",
    ),
    click.option("--tokens", type=click.Choice(["last", "all"]), help="Of a concept: which are edited."),
    click.option("--expand", is_flag=True, help="Also edit each concept inside a few templates."),
    click.option("--erase-scale", type=float, help="Weight of the concepts."),
    click.option("--preserve-scale", type=float, help="Weight of what is preserved."),
    click.option("--lamb", type=float, help="Weight of leaving the model as it is."),
    click.option("--pooled", is_flag=True, help="Also edit the pooled embedding of Stable Diffusion XL."),
)


@click.command()
@click.argument("concepts", nargs=-1, required=True)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The edit (.safetensors) to write."
)
@method_options
@click.option(
    "--lora", type=click.Path(path_type=Path), help="Also write the edit as a LoRA, which needs no pumice."
)
@click.option(
    "--lora-format",
    type=click.Choice(["diffusers", "kohya"]),
    help="By default diffusers; kohya is for A1111 and ComfyUI.",
)
@click.option(
    "--rank", type=click.IntRange(min=1), help="Of the LoRA, at most; by default all of it, without loss."
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
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the picture.")
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
    """Erase CONCEPTS from a model in closed form, and draw it before and after.

    Writes the edit, a picture of what it does beside it, and on request a LoRA or a whole model.
    `pumice.models.Edit.load(OUT).apply(pipe)` puts the edit on, `remove` takes it off again.
    """
    from pumice.io import write_whole

    arguments = _arguments(method, {"guide": guide, "type": concept_type} | given)
    for name, value in (("--lora-format", lora_format), ("--rank", rank)):
        if value is not None and lora is None:
            raise ValueError(f"{name}: got {value} without --lora")
    if prompts and no_picture:
        raise ValueError("--prompt: got one with --no-picture")
    picture = None if no_picture else out.with_suffix(".png")
    _check_outputs(out, picture, lora, single_file)
    opened = open_model(model, dtype, device)

    start = time.perf_counter()
    with warnings_of_erasure() as warned:
        edit = _edit(opened, method, concepts, arguments)
    seconds = time.perf_counter() - start
    sheet = None
    if picture is not None:
        shown = prompts or _prompts(concepts, concept_type or "object", model)
        sheet = _before_and_after(opened, edit, shown, seed, num_inference_steps)

    edit.save(out)
    if picture is not None and sheet is not None:
        file = io.BytesIO()
        sheet.save(file, "PNG")
        write_whole(picture, file.getvalue())
        click.echo(f"picture: {picture.resolve()}")
    if lora is not None:
        edit.save_lora(lora, opened.pipe, format=lora_format or "diffusers", rank=rank)  # type: ignore[arg-type]
    if single_file is not None:
        edit.save_single_file(single_file, opened.pipe)
    if not quiet:
        _print_table(edit, seconds)
    for warning in warned:
        click.echo(f"warning: {printable(warning)}", err=quiet)
    for name, path in (("lora", lora), ("model", single_file), ("edit", out)):
        if path is not None:
            click.echo(f"{name}: {path.resolve()}")


def _arguments(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The method's arguments: what was given, by the names that it has there."""
    from pumice import jobs

    # 0 is a number that was given
    chosen = {name: value for name, value in given.items() if value not in (None, ()) and value is not False}
    for name in chosen:
        if name not in ARGUMENTS[method]:
            raise ValueError(f"--{name.replace('_', '-')}: got one, which {method} does not take")
    if method in NEED_GUIDE and "guide" not in chosen:
        raise ValueError(f"--guide: got none, expected what concepts become, which {method} needs")
    if "guide" in chosen:
        guides = chosen["guide"]
        chosen["guide"] = guides[0] if len(guides) == 1 else guides
    if "preserve" in chosen:
        chosen["preserve"] = read_list(jobs.read_prompts, chosen["preserve"], "--preserve")
    of_type = TYPES.get(method, {}).get(chosen.get("type", ""), {})
    if of_type:
        del chosen["type"]
    return {ARGUMENTS[method][name]: value for name, value in chosen.items()} | dict(of_type)


def _check_outputs(out: Path, picture: Path | None, lora: Path | None, single_file: Path | None) -> None:
    from pumice.io.files import new_file

    named = {"--out": out, "--lora": lora, "--single-file": single_file}
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


def _edit(opened: DiffusionModel, method: str, concepts: tuple[str, ...], arguments: dict[str, Any]) -> Edit:
    """The edit, its arguments named in errors as the options that they came from."""
    from pumice import erase

    make, texts = getattr(erase, FUNCTIONS.get(method, method)), concepts
    if method == "time":
        guides = arguments["destinations"]
        texts = tuple(TIME_PROMPT.format(concept) if concept.strip() else concept for concept in concepts)
        arguments = arguments | {
            "destinations": TIME_PROMPT.format(guides)
            if isinstance(guides, str)
            else tuple(map(TIME_PROMPT.format, guides))
        }
    try:
        edit: Edit = make(opened, texts, **arguments)
    except ValueError as error:
        message = str(error)
        for option, argument in ARGUMENTS[method].items():
            message = re.sub(rf"^{argument}:", f"--{option.replace('_', '-')}:", message)
        raise ValueError(message) from error
    return replace(edit, targets=concepts)  # those of time are prompts


def _prompts(concepts: Sequence[str], concept_type: str, model: str) -> tuple[str, ...]:
    """Of the concepts, and of two things that should stay."""
    from pumice.erase.edits import HELD_OUT
    from pumice.testbed import world

    template = PROMPTS[concept_type]
    others = [PROMPTS["object"].format(name) for name in world.OBJECTS] if model == TESTBED else HELD_OUT
    kept = [text for text in others if not any(concept.casefold() in text.casefold() for concept in concepts)]
    return (*map(template.format, concepts[:PICTURED]), *kept[:2])


def _before_and_after(
    opened: DiffusionModel, edit: Edit, prompts: Sequence[str], seed: int, steps: int
) -> Image:
    import torch

    from pumice.evaluate import contact_sheet
    from pumice.evaluate.drawing import edited
    from pumice.models import RowBudget
    from pumice.models.drawing import draw

    def work(rows: int) -> torch.Tensor:
        parts = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
        drawn = [
            draw(
                opened.pipe,
                [seed] * len(part),
                2,
                prompt=[prompt for prompt in part for _ in range(2)],
                num_inference_steps=steps,
            )
            for part in parts
        ]
        return torch.cat(drawn, dim=1)

    with edited(opened, [None, edit]):
        pictures = RowBudget(PICTURED + 2).run(work)
    return contact_sheet(list(pictures.transpose(0, 1)), columns=["before", "after"], labels=prompts)


def _print_table(edit: Edit, seconds: float) -> None:
    found = edit.report()
    for name, value in (
        ("overall change", f"{found['overall_change']:.1%} of the weights' norm"),
        ("residual", f"{found['residual']:.1%} of the way is left"),
        ("drift", f"{found['drift']:.1%} of other prompts' tokens"),
        ("condition number", f"{found['condition_number']:.2g}"),
        ("rank", found["rank"]),
        ("encoder calls", found["encoder_calls"]),
        ("seconds", f"{seconds:.2f}"),
    ):
        click.echo(f"{name:<16}  {value}")
