"""`pumice evaluate`: what a defence does to a model's pictures, measured."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .attacks import ATTACKS, attack, parsed
from .options import (
    TESTBED,
    model_options,
    open_model,
    printable,
    read_list,
    run_details,
    warnings_of_erasure,
)

if TYPE_CHECKING:  # importing them takes seconds, which --help should not
    from PIL.Image import Image
    from torch import Tensor

    from pumice.evaluate import Classify, Erasure, Matrix, Study
    from pumice.evaluate.attacks import Attack
    from pumice.models import DiffusionModel, Edit
    from pumice.report.erasure import Failed
    from pumice.testbed import Trial

TESTBED_PROMPTS = 24


@click.group()
def evaluate() -> None:
    """Measure what a defence does, and what it costs."""


@evaluate.command("erase")
@click.argument("edits", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option(
    "--erased",
    type=click.Path(path_type=Path),
    help="A list (.csv, .jsonl) of `prompt` and the `label` that its pictures should no longer have.",
)
@click.option(
    "--preserved",
    type=click.Path(path_type=Path),
    help="A list of `prompt` and the `label` that its pictures should still have.",
)
@click.option(
    "--classifier",
    help="Folder or hub id of what finds the labels: an image classifier of transformers, or a CLIP, which "
    "tells those of the two lists apart.",
)
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    help=f"Of the testbed's own trials: prompts of each kind, by default {TESTBED_PROMPTS}.",
)
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Pictures a prompt.")
@click.option(
    "--k",
    multiple=True,
    type=click.IntRange(min=1),
    help="A label counts among the first k; again for more. By default 1 and 5, for the testbed 1.",
)
@click.option("--num-inference-steps", default=50, show_default=True, type=click.IntRange(min=1))
@click.option("--guidance-scale", default=7.5, show_default=True)
@click.option(
    "--attacks",
    metavar="NAME[=STEPS],...",
    help=f"What is tried to bring each concept back: {', '.join(ATTACKS)}, or all. By default nothing; steps "
    "by default the papers', which can take hours.",
)
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1))
@model_options
def erase(
    edits: tuple[Path, ...],
    out: Path,
    *,
    erased: Path | None,
    preserved: Path | None,
    classifier: str | None,
    prompts: int | None,
    k: tuple[int, ...],
    attacks: str | None,
    model: str,
    dtype: str,
    device: str | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Draw a model and EDITS of it from the same noise, and count what is gone and what is still there.

    What to draw are two lists, or on the testbed prompts of its own, with and without what the edits erase.
    Writes sheet.png, report.html, results.json and rows.csv into --out, and anew after each attack.
    """
    from pumice import evaluate, jobs
    from pumice.io import check_writable
    from pumice.models import fingerprint
    from pumice.report.erasure import Failed, called, heading

    if erased is not None or preserved is not None:
        if classifier is None:
            raise ValueError("--classifier: got none, expected one, which finds the labels of the lists")
        if prompts is not None:
            raise ValueError("--prompts: got one with lists, of which every prompt is drawn")
    elif model != TESTBED:
        raise ValueError("--erased, --preserved: got none, expected lists; only the testbed has its own")
    elif classifier is not None:
        raise ValueError("--classifier: got one without --erased and --preserved, whose labels it finds")
    chosen = parsed(attacks) if attacks else {}
    files = {"--erased": erased, "--preserved": preserved}
    pairs = [[] if file is None else read_list(jobs.read_labels, file, name) for name, file in files.items()]
    loaded = _loaded(edits)
    check_writable(out, "--out")
    opened = open_model(model, dtype, device)
    base = fingerprint(opened)
    for name, edit in loaded.items():
        try:
            edit.check_fits(opened, base)
        except ValueError as error:
            raise ValueError(f"EDITS: {name}: {error}") from error
    if classifier is None:
        trials, agreement = _of_testbed(loaded, prompts or TESTBED_PROMPTS, quiet)
    else:
        trials, agreement = _of_lists(pairs[0], pairs[1], classifier, opened)

    given = {"prompts": prompts, "classifier": classifier, "attacks": attacks, **settings}
    about = run_details(model, opened, edits=", ".join(loaded), **given)
    found: dict[str, Erasure] = {}
    attacked: dict[str, list[Attack | Failed]] = {}
    with warnings_of_erasure() as warned:
        for trial in trials:
            found[trial.concept] = evaluate.erasure(
                opened,
                loaded,
                trial.erased,
                trial.preserved,
                classify=trial.classify,
                k=k or ((1,) if classifier is None else (1, 5)),
                agreement=agreement,
                progress=not quiet,
                **settings,
            )
            attacked[trial.concept] = []
            _write(out, found, attacked, model, about)
        sheet = out / "sheet.png"
        click.echo(f"pictures: {sheet.resolve()}")
        for trial in trials:
            for made in attack(
                opened,
                loaded,
                trial,
                found[trial.concept],
                chosen,
                k=min(k, default=1),
                num_inference_steps=settings["num_inference_steps"],
                guidance_scale=settings["guidance_scale"],
                rows=settings["batch_size"],
                progress=not quiet,
            ):
                attacked[trial.concept].append(made)
                _write(out, found, attacked, model, about)
    if not quiet:
        for concept, one in found.items():
            _print_table(concept, _with_attacks(one.table(), attacked[concept]))
            for each in attacked[concept]:
                if not isinstance(each, Failed):
                    _print_table(f"{heading(each)}, success in %", each.table())
    failed = [each for every in attacked.values() for each in every if isinstance(each, Failed)]
    warned += [f"{called(each)} of {each.label} failed: {each.reason}" for each in failed]
    for warning in warned:
        click.echo(f"warning: {printable(warning)}", err=quiet)
    click.echo(f"report: {(out / 'report.html').resolve()}")


def _write(
    out: Path,
    found: Mapping[str, Erasure],
    attacked: Mapping[str, Sequence[Attack | Failed]],
    model: str,
    about: dict[str, Any],
) -> None:
    """All that is known so far."""
    from pumice import report
    from pumice.io import write_whole

    write_whole(out / "sheet.png", _png(_sheet(found)))
    write_whole(out / "rows.csv", _csv(found, attacked))
    results = _json(found, attacked) | {"run": about}
    write_whole(out / "results.json", json.dumps(results, indent=1, allow_nan=False))
    page = report.erasure_page(found, attacks=attacked, model=model, details=about)
    write_whole(out / "report.html", page)


def _loaded(files: Sequence[Path]) -> dict[str, Edit]:
    """The edits by their files' names, with their folders where these are the same."""
    from pumice.models import Edit

    stems = Counter(file.stem for file in files)
    edits: dict[str, Edit] = {}
    for file in files:
        name = file.stem if stems[file.stem] == 1 else str(file.with_suffix(""))
        if name in edits:
            raise ValueError(f"EDITS: got {str(file)!r} twice, expected each once")
        edits[name] = Edit.load(file)
    return edits


def _of_testbed(edits: Mapping[str, Edit], prompts: int, quiet: bool) -> tuple[list[Trial], Any]:
    """A trial of each concept of the testbed's world that any edit erases, and its CLIP."""
    from pumice import evaluate, testbed

    targets = {target: _of_world(target) for edit in edits.values() for target in edit.targets}
    unknown = ", ".join(repr(target) for target, concept in targets.items() if concept is None)
    concepts = list(dict.fromkeys(concept for concept in targets.values() if concept is not None))
    if not concepts:
        raise ValueError(
            f"EDITS: got ones of {unknown}, which the testbed's world does not have; give --erased and "
            "--preserved"
        )
    if unknown:
        click.echo(f"warning: nothing tells whether {printable(unknown)} is gone", err=quiet)
    trials = [testbed.trial(concept, prompts) for concept in concepts]
    return trials, evaluate.clip_agreement(*testbed.load_clip())


def _of_world(target: str) -> str | None:
    """The concept of the testbed's world that a target is, or is the only one to name: "a ball"."""
    from pumice.erase.arguments import speaks_of
    from pumice.testbed import memorized_captions, world

    if target in memorized_captions():
        return target
    named = [concept for concept in (*world.OBJECTS, *world.STYLES) if speaks_of(target, concept)]
    return named[0] if len(named) == 1 else None


def _of_lists(
    erased: list[tuple[str, str]],
    preserved: list[tuple[str, str]],
    classifier: str,
    opened: DiffusionModel,
) -> tuple[list[Trial], Any]:
    """One trial of the two lists, and the agreement with prompts if CLIP is what tells labels."""
    from pumice import evaluate, testbed

    gone = list(dict.fromkeys(label for _, label in erased))
    concept = ", ".join(gone[:5]) + (f" and {len(gone) - 5} more" if len(gone) > 5 else "")
    classify: Classify
    try:
        network, processor = _open_classifier(classifier)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"--classifier: {classifier!r} cannot be loaded: {reason}") from error
    network.to(opened.device)
    agreement = None
    if network.config.model_type == "clip":
        labels = list({label.casefold(): label for _, label in (*erased, *preserved)}.values())
        classify = evaluate.clip_classifier(network, processor, labels)
        agreement = evaluate.clip_agreement(network, processor)
    else:
        classify = evaluate.image_classifier(network, processor)
    trial = testbed.Trial(concept or "nothing erased", tuple(erased), tuple(preserved), classify)  # type: ignore[arg-type]
    return [trial], agreement


def _open_classifier(source: str) -> tuple[Any, Any]:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageClassification,
        AutoProcessor,
        CLIPModel,
    )

    if AutoConfig.from_pretrained(source).model_type == "clip":
        return CLIPModel.from_pretrained(source, use_safetensors=True), AutoProcessor.from_pretrained(source)
    network = AutoModelForImageClassification.from_pretrained(source, use_safetensors=True)
    return network, AutoImageProcessor.from_pretrained(source)


def _sheet(found: Mapping[str, Erasure]) -> Image:
    """A row for each prompt whose pictures are shown, without an edit and with each."""
    from pumice.evaluate import contact_sheet
    from pumice.report.erasure import shown

    rows, labels, columns = [], [], []
    for one in found.values():
        columns = ["before", *list(one.pictures)[1:]]
        for index in shown(one):
            rows.append([pictures[index] for pictures in one.pictures.values()])
            labels.append((*one.erased, *one.preserved)[index][0])
    return contact_sheet(rows, columns=columns, labels=labels)


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _csv(found: Mapping[str, Erasure], attacks: Mapping[str, Sequence[Attack | Failed]]) -> str:
    """One line a concept and edit; empty is what was not measured, attacks are means over labels."""
    from pumice.report.erasure import successes

    rows = []
    for concept, one in found.items():
        for row in one.rows:
            brought = successes(attacks[concept], row["name"])
            columns = {f"attack_{name}": success for name, success in brought.items()}
            rows.append({"concept": concept, **row, **columns})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _of_attack(attack: Attack | Failed) -> dict[str, Any]:
    from pumice.report.erasure import Failed, called

    about = (
        {"label": attack.label, "failed": attack.reason} if isinstance(attack, Failed) else attack.to_dict()
    )
    return about | {"attack": called(attack)}


def _json(found: Mapping[str, Erasure], attacks: Mapping[str, Sequence[Attack | Failed]]) -> dict[str, Any]:
    return {
        "concepts": [
            {
                "concept": concept,
                **one.to_dict(),
                "attacks": [_of_attack(each) for each in attacks[concept]],
            }
            for concept, one in found.items()
        ]
    }


def _with_attacks(
    lines: Sequence[Sequence[str]], attacks: Sequence[Attack | Failed]
) -> list[tuple[str, ...]]:
    """The lines of an erasure's table, and how often each attack brought the concept back, in per cent."""
    from pumice.report.erasure import successes

    titles, *rows = lines
    found = {name: successes(attacks, name) for name, *_ in rows}
    return [
        (*titles, *next(iter(found.values()))),
        *(
            (*row, *("-" if success is None else f"{success:.1f}" for success in found[row[0]].values()))
            for row in rows
        ),
    ]


def _print_table(title: str, lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    click.echo(f"\n{printable(title)}")
    for name, *cells in lines:
        row = [f"{printable(name):<{widths[0]}}"]
        row += [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        click.echo("  ".join(row))


@evaluate.command("matrix")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--quick", is_flag=True, help="One subject, few methods, short trainings: minutes, not hours.")
@click.option("--subjects", help="Of the testbed's world, such as 0,1. By default 0,1, with --quick 0.")
@click.option("--seeds", type=click.IntRange(min=1), help="Trainings of each. By default 3, with --quick 1.")
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Processes that share the work.",
)
@click.option("--restart", is_flag=True, help="Throw away what is in the folder, instead of going on.")
@click.option("--quiet", is_flag=True, help="No progress bar and no table.")
def matrix(
    out: Path,
    *,
    quick: bool,
    subjects: str | None,
    seeds: int | None,
    workers: int,
    restart: bool,
    quiet: bool,
) -> None:
    """Set protections, purifiers and ways of training against each other, on subjects of the testbed.

    Every protection is purified in every way and learned in every way; judges say how much of the subject
    comes back. It may be stopped and goes on where it was. Writes report.html, results.json and rows.csv into
    --out, what took time into its folder parts.
    """
    from pumice import evaluate, testbed
    from pumice.evaluate.study import MISMATCH
    from pumice.io import check_writable, write_whole
    from pumice.report.matrix import matrix_page

    of = _numbers(subjects, "--subjects") if subjects else ([0] if quick else [0, 1])
    count = seeds or (1 if quick else 3)
    check_writable(out, "--out")
    opened = open_model(TESTBED, "float32", "cpu")
    found = evaluate.matrix(
        partial(_embedded_study, quick=quick, subjects=of, seeds=range(count)),
        out,
        workers=workers,
        restart=restart,
        progress=not quiet,
    )
    subject, other = MISMATCH
    seen = evaluate.mismatch(_compared(found), *testbed.load_clip(), subject, other=other)
    settings = {"quick": quick, "subjects": ", ".join(map(str, of)), "seeds": count}
    about = run_details(TESTBED, opened, **settings)
    write_whole(out / "rows.csv", found.to_csv())
    results = {**found.to_dict(), "mismatch": seen.to_dict(), "run": about}
    write_whole(out / "results.json", json.dumps(results, indent=1, allow_nan=False))
    page = matrix_page(found, mismatch=seen, model="the embedded model", details=about)
    write_whole(out / "report.html", page)
    if not quiet:
        _print_table("what is learned", found.table())
        _print_table("what CLIP sees", seen.table())
    click.echo(f"report: {(out / 'report.html').resolve()}")


def _embedded_study(**settings: Any) -> Study:
    """In every process, without progress bars of the libraries."""
    from pumice import evaluate

    open_model(TESTBED, "float32", "cpu")
    return evaluate.embedded_study(**settings)


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option}: got {text!r}, expected numbers with commas between") from error


def _compared(found: Matrix) -> dict[str, Tensor]:
    """Pictures of all subjects by what was done to them: clean ones first, each protection, and purified."""
    import torch

    groups: dict[str, list[Tensor]] = {}
    for (_, protection, purifier), pictures in found.pictures.items():
        done = [name for name in (protection, purifier) if name != "none"]
        if protection != "none" or not done:
            groups.setdefault(", ".join(done) or "clean", []).append(pictures / 255)
    return {name: torch.cat(parts) for name, parts in groups.items()}


@evaluate.command("mismatch")
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER[=NAME]...")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for report.html and results.json.")
@click.option("--clip", required=True, help="A folder or hub id, such as openai/clip-vit-base-patch32.")
@click.option("--subject", default="person", show_default=True, help="What the pictures should show.")
@click.option("--other", default="noise", show_default=True, help="What they should not show.")
@click.option("--template", default="a photo of {}", show_default=True, help="Of both prompts.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--quiet", is_flag=True, help="No table.")
def mismatch(folders: tuple[str, ...], out: Path | None, *, clip: str, quiet: bool, **settings: Any) -> None:
    """Ask a CLIP whether the pictures of FOLDERs still show their subject, or noise.

    Name the folder of clean pictures first, then those of noise, of protected and of purified pictures.
    """
    from pumice import evaluate, testbed
    from pumice.io import check_writable, write_whole
    from pumice.report.matrix import mismatch_page

    if out is not None:
        check_writable(out, "--out")
    groups = _folders(folders)
    if clip == TESTBED:
        network, processor = testbed.load_clip()
    else:
        network, processor = _open_clip(clip)
    found = evaluate.mismatch(groups, network, processor, **settings)
    if out is not None:
        about = run_details(clip, network, **settings)
        results = json.dumps(found.to_dict() | {"run": about}, indent=1, allow_nan=False)
        write_whole(out / "results.json", results)
        write_whole(out / "report.html", mismatch_page(found, model=clip, details=about))
    if not quiet:
        _print_table(f"{found.settings['subject']!r} or {found.settings['other']!r}", found.table())
    if out is not None:
        click.echo(f"report: {(out / 'report.html').resolve()}")


def _folders(given: Sequence[str]) -> dict[str, list[Tensor]]:
    """The pictures right in each folder, by its name or the one that was given to it."""
    from pumice.io import read_image
    from pumice.jobs import folders

    groups: dict[str, list[Tensor]] = {}
    for text in given:
        source, name = text, Path(text).name
        if not Path(text).exists() and "=" in text:
            source, _, name = text.rpartition("=")
        if name in groups:
            raise ValueError(f"FOLDER: got {name!r} twice, expected names of their own, as FOLDER=NAME")
        root, names = folders.right_in(Path(source), "FOLDER")
        groups[name] = [read_image(root / each) for each in names]
    return groups


def _open_clip(source: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoProcessor, CLIPModel

    try:
        if AutoConfig.from_pretrained(source).model_type != "clip":
            raise ValueError("it is none")
        return CLIPModel.from_pretrained(source, use_safetensors=True), AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"--clip: {source!r} cannot be loaded as a CLIP: {reason}") from error
