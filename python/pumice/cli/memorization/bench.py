"""`pumice memorization bench`: mitigations set against each other, and against a red team."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from pumice.cli.options import TESTBED, model_options, open_model, run_details

from .options import GUARDS

if TYPE_CHECKING:  # importing them takes seconds, which --help should not
    from torch import Tensor

    from pumice.models import DiffusionModel
    from pumice.pipelines import Guard

MITIGATIONS = (*(name for name in GUARDS if name != "refuse"), "random_tokens")
FRESH = 100  # of the testbed's captions


@click.command()
@click.argument("pairs", required=False, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option(
    "--mitigation",
    "chosen",
    multiple=True,
    type=click.Choice(MITIGATIONS),
    help="One to try; again for more. By default all, or none beside --edit.",
)
@click.option(
    "--edit",
    "edits",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An edit of `repair` to try; again for more.",
)
@click.option("--calibration", type=click.Path(path_type=Path), help="Says when guards act.")
@click.option("--threshold", type=float, help="Instead, the magnitude of one seed above which they do.")
@click.option(
    "--sscd", type=click.Path(path_type=Path), help="TorchScript file of the similarity's descriptor."
)
@click.option("--clip", help="Folder or hub id of a CLIP model that judges agreement with the prompt.")
@click.option(
    "--fresh", type=click.Path(path_type=Path), help="Prompts that are not memorized, judged by --clip."
)
@click.option("--seeds", default=4, show_default=True, type=click.IntRange(min=1), help="Pictures a prompt.")
@click.option("--num-inference-steps", default=50, show_default=True, type=click.IntRange(min=1))
@click.option("--guidance-scale", default=7.5, show_default=True)
@click.option(
    "--red-team-steps",
    type=click.IntRange(min=0),
    help="Of the attack on each mitigation; 0 for none. By default 50, the paper's; for the testbed, whose "
    "embeddings are large for its pictures, 10: with 50 most pictures can be had, seen or not.",
)
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--restart", is_flag=True, help="Throw away what --out has of an earlier run.")
@model_options
def bench(
    pairs: Path | None,
    out: Path,
    *,
    chosen: tuple[str, ...],
    edits: tuple[Path, ...],
    red_team_steps: int | None,
    calibration: Path | None,
    threshold: float | None,
    sscd: Path | None,
    clip: str | None,
    fresh: Path | None,
    model: str,
    dtype: str,
    device: str | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Draw memorized prompts under each mitigation, and see which still replay their pictures.

    PAIRS is a list (.csv, .jsonl) of `prompt` and `picture`, the training picture that the prompt replays;
    the testbed has its own. Writes bench.csv, bench.json and report.html into --out. Interrupted, the same
    command goes on where it stopped.
    """
    from pumice import jobs, memorization, models, report
    from pumice.io import check_writable, write_whole

    known = None if pairs is None else jobs.read_pairs(pairs)
    if known is None and model != TESTBED:
        raise ValueError(
            "PAIRS: got none, expected a list of prompts and pictures; only the testbed has its own"
        )
    if known is not None and sscd is None:
        raise ValueError("--sscd: got none, expected the file of a descriptor that tells copies")
    check_writable(out, "--out")
    opened = open_model(model, dtype, device)
    # pictures are kept by these names, so what draws others must have another
    loaded = {f"edit {file.stem} {_short(file)}": models.Edit.load(file) for file in edits}
    names = chosen or (() if edits else MITIGATIONS)
    guards = _guards(opened, model, calibration, threshold) if set(names) & set(GUARDS) else None
    mitigations: dict[str, Any] = {}
    for name in names:
        guard = guards(name) if guards is not None and name in GUARDS else None
        shown = name if guard is None else f"{name} above {guard.threshold:.4g}"
        mitigations[shown] = _mitigation(name, guard)
    mitigations |= {name: edit.on for name, edit in loaded.items()}
    judges = _testbed_judges() if known is None else _judges(known, sscd, clip, fresh, opened)
    if red_team_steps is None:
        red_team_steps = 10 if model == TESTBED else 50
    found = memorization.bench(
        opened,
        **judges,
        mitigations=mitigations,
        red_team_steps=red_team_steps,
        out=out,
        progress=not quiet,
        **settings,
    )
    about = run_details(
        model, opened, **{name: value for name, value in found.settings.items() if name != "model"}
    )
    write_whole(out / "bench.csv", found.to_csv())
    write_whole(out / "bench.json", json.dumps(found.to_dict() | {"run": about}, indent=1))
    write_whole(out / "report.html", report.bench_page(found, model=model, details=about))
    if not quiet:
        click.echo(found.table())
    click.echo(f"report: {(out / 'report.html').resolve()}")


def _guards(
    opened: DiffusionModel, model: str, file: Path | None, threshold: float | None
) -> Callable[[Any], Guard]:
    """From a mitigation's name to a guard."""
    from pumice import testbed
    from pumice.memorization import Calibration
    from pumice.pipelines import Guard

    if threshold is not None and file is not None:
        raise ValueError("--calibration, --threshold: got both, expected one")
    if threshold is not None:
        return partial(Guard, threshold)
    if file is None and model != TESTBED:
        raise ValueError("--calibration: got none and no --threshold, which guards need")
    calibration = testbed.calibration() if file is None else Calibration.load(file)
    calibration.check(opened)
    return partial(Guard.calibrated, calibration)


def _mitigation(name: str, guard: Guard | None) -> Callable[[Any], AbstractContextManager[Any]]:
    from pumice import pipelines
    from pumice.memorization import perturb_prompt

    @contextmanager
    def random_tokens(pipe: Any) -> Iterator[Any]:
        def draw(prompt: Sequence[str] | None = None, **inputs: Any) -> Any:
            if prompt is not None:  # the red team comes with embeddings
                prompt = [perturb_prompt(text, pipe.tokenizer, how="add_tokens") for text in prompt]
            return pipe(prompt, **inputs)

        yield draw

    @contextmanager
    def guarded(pipe: Any) -> Iterator[Any]:
        watched = pipelines.around(pipe)

        def draw(prompt: Sequence[str] | None = None, **inputs: Any) -> Any:
            # where a prompt ends, the red team's embeddings do not tell
            knows = prompt is not None or name != "attention_rescaling"
            return watched(prompt, guard=guard if knows else None, **inputs)

        yield draw

    return random_tokens if name == "random_tokens" else guarded


def _short(file: Path) -> str:
    """Six letters that tell an edit from another of its file name; what is no file is told when loaded."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:6] if file.is_file() else ""


def _testbed_judges() -> dict[str, Any]:
    """The testbed's memorized pictures, and its own similarity, CLIP and attribute reader."""
    import numpy as np
    import torch

    from pumice import evaluate, testbed
    from pumice.testbed import world

    pairs = [world.memorized(index) for index in range(world.MEMORIZED_COUNT)]
    rng = np.random.default_rng(88)
    scenes = [world.random_scene(rng) for _ in range(FRESH)]
    reader = testbed.load_reader()

    def attributes(images: Tensor, prompts: Sequence[str]) -> float:
        """The share of the captions' attributes that the pictures show."""
        return fmean(reader.accuracy(images, scenes).values())

    return {
        "prompts": [pair.caption for pair in pairs],
        "pictures": [torch.from_numpy(pair.picture) for pair in pairs],
        "similarity": testbed.similarity,
        "replayed": testbed.REPLAYED,
        "agreement": evaluate.clip_agreement(*testbed.load_clip()),
        "fresh_prompts": [world.full_caption(scene) for scene in scenes],
        "fresh_quality": attributes,
    }


def _judges(
    pairs: dict[str, list[Path]],
    sscd: Path | None,
    clip: str | None,
    fresh: Path | None,
    opened: DiffusionModel,
) -> dict[str, Any]:
    """The user's pictures, descriptor and CLIP; fresh prompts are judged by CLIP too."""
    from pumice import evaluate, jobs

    if sscd is None:
        raise ValueError("--sscd: got none, expected the file of a descriptor that tells copies")
    if fresh is not None and clip is None:
        raise ValueError("--fresh: got one without --clip, which judges what fresh prompts draw")
    found: dict[str, Any] = {
        "prompts": list(pairs),
        "pictures": [_stacked(files) for files in pairs.values()],
        "similarity": evaluate.sscd(sscd, device=opened.device),
    }
    if clip is not None:
        from transformers import AutoProcessor, CLIPModel

        model, processor = CLIPModel.from_pretrained(clip), AutoProcessor.from_pretrained(clip)
        found["agreement"] = evaluate.clip_agreement(model.to(opened.device), processor)
    if fresh is not None:
        found |= {"fresh_prompts": jobs.read_prompts(fresh), "fresh_quality": found["agreement"]}
    return found


def _stacked(files: Sequence[Path]) -> Tensor:
    """The pictures of one prompt, all of the first one's size."""
    import torch

    from pumice.io import read_image

    first = read_image(files[0])
    size = (first.shape[1], first.shape[2])
    return torch.stack([first, *(read_image(file, size) for file in files[1:])])
