"""`pumice memorization`: which prompts replay training pictures."""

from __future__ import annotations

import csv
import io
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # importing it takes seconds, which --help should not
    from pumice.jobs import Scan

TESTBED = "testbed"
SHOWN = 40  # prompts in the table on the screen


@click.group()
def memorization() -> None:
    """Find what a model replays of its training pictures."""


@memorization.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option(
    "--model",
    default=TESTBED,
    show_default=True,
    help="A diffusers folder, a .safetensors checkpoint or a hub id.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option(
    "--seeds", default=4, show_default=True, type=click.IntRange(min=1), help="Initial noises a prompt."
)
@click.option(
    "--steps",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Denoising steps that are scored.",
)
@click.option(
    "--num-inference-steps", default=50, show_default=True, type=click.IntRange(min=1), help="Of the sampler."
)
@click.option(
    "--guidance-scale", default=7.5, show_default=True, help="Of the sampler, from its second step on."
)
@click.option("--height", type=click.IntRange(min=1), help="Of the pictures, in px; by default the model's.")
@click.option("--width", type=click.IntRange(min=1), help="Of the pictures, in px; by default the model's.")
@click.option(
    "--batch-size",
    default=32,
    show_default=True,
    type=click.IntRange(min=1),
    help="Rows in a call of the denoiser.",
)
@click.option("--threshold", type=float, help="Call prompts with a higher score memorized.")
@click.option(
    "--fresh",
    type=click.Path(path_type=Path),
    help="A list of prompts known not to be memorized, to set the threshold by. The testbed brings its own.",
)
@click.option(
    "--fpr",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the fresh prompts that may score above the threshold.",
)
@click.option(
    "--pictures",
    default=24,
    show_default=True,
    type=click.IntRange(min=0),
    help="Generate a picture for so many of the highest scores.",
)
@click.option(
    "--dtype", default="float32", show_default=True, type=click.Choice(["float32", "float16", "bfloat16"])
)
@click.option("--device", help="By default a GPU if there is one.")
@click.option("--restart", is_flag=True, help="Throw away what --out has of an earlier scan.")
@click.option("--quiet", is_flag=True, help="No progress bars and no table.")
def scan(
    prompts: Path,
    model: str,
    out: Path,
    *,
    threshold: float | None,
    fresh: Path | None,
    fpr: float,
    pictures: int,
    dtype: str,
    device: str | None,
    restart: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Score every prompt of a list (.txt, .csv, .jsonl) and report those that pull hardest.

    Writes scores.csv, scores.json and report.html into --out. Interrupted, the same command goes on where it
    stopped.
    """
    import diffusers
    import torch
    import transformers

    import pumice
    from pumice import jobs, models, report, testbed
    from pumice.io import check_writable, write_whole

    texts = jobs.read_prompts(prompts)
    fresh_texts = None if fresh is None else jobs.read_prompts(fresh)
    check_writable(out, "--out")
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model == TESTBED and threshold is None and fresh is None:
        fresh_texts = testbed.fresh_prompts()
    try:
        source = testbed.WEIGHTS if model == TESTBED else model
        opened = models.load(source, dtype=getattr(torch, dtype), device=device)
    except ValueError as error:
        raise ValueError(str(error).replace("source:", "--model:", 1)) from error
    opened.pipe.set_progress_bar_config(disable=True)
    found = jobs.scan(
        opened,
        texts,
        out,
        threshold=threshold,
        fresh=fresh_texts,
        fpr=fpr,
        pictures=pictures,
        restart=restart,
        progress=not quiet,
        **settings,
    )
    threshold_text = "" if found.threshold is None else f"{found.threshold:.4f}, "
    details = {
        "model": model,
        "threshold": threshold_text + found.threshold_source,
        **{name.replace("_", " "): value for name, value in settings.items() if value is not None},
        "dtype": dtype,
        "device": device,
        "pumice": pumice.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_whole(out / "scores.csv", _csv(found))
    write_whole(out / "scores.json", json.dumps(_json(found) | {"run": details}, indent=1))
    write_whole(
        out / "report.html", report.scan_page(found, model=model, prompts=prompts.name, details=details)
    )
    if not quiet:
        _print_table(found)
    click.echo(f"report: {(out / 'report.html').resolve()}")


def _rows(found: Scan) -> list[dict[str, Any]]:
    detection, verdicts = found.detection, found.memorized
    return [
        {
            "rank": rank,
            "prompt": detection.prompts[index],
            "score": detection.scores[index].item(),
            "memorized": verdicts[index],
            "truncated": detection.truncated[index],
        }
        for rank, index in enumerate(found.order, 1)
    ]


def _csv(found: Scan) -> str:
    """Ranked; the verdict is empty where there is no threshold."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=["rank", "prompt", "score", "memorized", "truncated"])
    writer.writeheader()
    for row in _rows(found):
        writer.writerow(row | {"score": f"{row['score']:.6f}"})
    return file.getvalue()


def _json(found: Scan) -> dict[str, Any]:
    return {
        "threshold": found.threshold,
        "threshold_source": found.threshold_source,
        "seeds": list(found.detection.seeds),
        "timesteps": list(found.detection.timesteps),
        "prompts": [
            row | {"magnitudes": found.detection.magnitudes[index].tolist()}
            for row, index in zip(_rows(found), found.order, strict=True)
        ],
    }


def _print_table(found: Scan) -> None:
    rows = _rows(found)
    verdict = {True: "memorized", False: "fresh", None: "-"}
    click.echo(f"{'rank':>5} {'score':>9}  {'verdict':<10} prompt")
    for row in rows[:SHOWN]:
        text = "".join(
            c if c.isprintable() else " " for c in row["prompt"]
        )  # no terminal escapes from a list
        click.echo(f"{row['rank']:>5} {row['score']:>9.4f}  {verdict[row['memorized']]:<10} {text[:70]}")
    if len(rows) > SHOWN:
        click.echo(f"      and {len(rows) - SHOWN} more in scores.csv")
    if found.threshold is None:
        click.echo("no verdicts: give --threshold, or --fresh with prompts known not to be memorized")
    else:
        count = sum(row["memorized"] for row in rows)
        click.echo(f"{count} of {len(rows)} above {found.threshold:.4f} ({found.threshold_source})")
