"""`pumice memorization scan`: which prompts of a list replay training pictures."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pumice.cli.options import TESTBED, model_options, open_model, printable, run_details

from .options import GUARDS, chosen_metric, score_options

if TYPE_CHECKING:  # importing it takes seconds, which --help should not
    from pumice.jobs import Scan
    from pumice.memorization import Calibration
    from pumice.models import DiffusionModel

SHOWN = 40  # prompts in the table on the screen


@click.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="What decides: a file of `calibrate`. The testbed brings its own.",
)
@click.option("--threshold", type=float, help="Instead, call prompts with a higher score memorized.")
@click.option(
    "--fresh",
    type=click.Path(path_type=Path),
    help="Instead, a list of prompts known not to be memorized, to set the threshold by.",
)
@click.option(
    "--fpr",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the fresh prompts that may score above the threshold.",
)
@click.option("--sequential", is_flag=True, help="Decide prompts by as few seeds as the calibration allows.")
@click.option(
    "--details",
    default=24,
    show_default=True,
    type=click.IntRange(min=0),
    help="Explain and draw so many of the highest scores.",
)
@click.option(
    "--guard",
    type=click.Choice([*GUARDS, "none"]),
    help="Draw these pictures again with this guard. By default embedding where there is a threshold.",
)
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps unconditional predictions.")
@click.option("--restart", is_flag=True, help="Throw away what --out has of an earlier scan.")
@score_options
@model_options
def scan(
    prompts: Path,
    out: Path,
    *,
    calibration: Path | None,
    threshold: float | None,
    fresh: Path | None,
    fpr: float,
    sequential: bool,
    details: int,
    guard: str | None,
    restart: bool,
    metric: str | None,
    steps: int | None,
    model: str,
    dtype: str,
    device: str | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Score every prompt of a list (.txt, .csv, .jsonl) and look closely at those that pull hardest.

    Writes scores.csv, scores.json and report.html into --out, and memorized.jsonl, a list of the prompts that
    are called memorized, for the other commands. Interrupted, the same command goes on where it stopped.
    """
    from pumice import jobs, report
    from pumice.io import check_writable, write_whole
    from pumice.memorization import Calibration

    texts = jobs.read_prompts(prompts)
    fresh_texts = None if fresh is None else jobs.read_prompts(fresh)
    loaded = None if calibration is None else Calibration.load(calibration)
    check_writable(out, "--out")
    opened = open_model(model, dtype, device)
    settings |= {"metric": chosen_metric(metric, steps)}
    if model == TESTBED and threshold is None and fresh is None and loaded is None:
        loaded, fresh_texts = _of_testbed(opened, settings)
    decides = loaded is not None or threshold is not None or fresh_texts is not None
    if guard is None and decides and _reads_first_step(settings["metric"], loaded):
        guard = "embedding"
    found = jobs.scan(
        opened,
        texts,
        out,
        calibration=loaded,
        threshold=threshold,
        fresh=fresh_texts,
        fpr=fpr,
        details=details,
        guard=None if guard == "none" else guard,  # type: ignore[arg-type]
        restart=restart,
        progress=not quiet,
        **settings | ({"sequential": True} if sequential else {}),
    )
    threshold_text = "" if found.threshold is None else f"{found.threshold:.4f}, "
    about = run_details(
        model, opened, threshold=threshold_text + found.threshold_source, guard=guard, **settings
    )
    write_whole(out / "scores.csv", _csv(found))
    write_whole(out / "scores.json", json.dumps(_json(found) | {"run": about}, indent=1, default=str))
    memorized = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in _rows(found) if row["memorized"]]
    write_whole(out / "memorized.jsonl", "".join(memorized))
    write_whole(
        out / "report.html", report.scan_page(found, model=model, prompts=prompts.name, details=about)
    )
    if not quiet:
        _print_table(found)
    click.echo(f"report: {(out / 'report.html').resolve()}")


def _of_testbed(
    opened: DiffusionModel, settings: dict[str, Any]
) -> tuple[Calibration | None, list[str] | None]:
    """The testbed's calibration, or, for another dtype or other settings, fresh prompts to score anew."""
    from pumice import testbed
    from pumice.memorization.settings import resolve

    calibration = testbed.calibration()
    scored = {name: value for name, value in settings.items() if name not in ("batch_size", "cache")}
    try:
        calibration.check(opened)
        resolve(opened, calibration.settings, **scored)
    except ValueError:
        return None, testbed.fresh_prompts()
    return calibration, None


def _reads_first_step(metric: Any, calibration: Calibration | None) -> bool:
    """Whether the threshold is one of what a guard reads, the magnitude at the first step."""
    from pumice.memorization import Magnitude
    from pumice.memorization.settings import checked_metric

    if metric is None and calibration is not None:
        metric = calibration.settings.metric
    return checked_metric(metric or "magnitude") == Magnitude()


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
    detection = found.detection.to_dict()
    rows = []
    for row, index in zip(_rows(found), found.order, strict=True):
        row |= {"seed_scores": detection["seed_scores"][index], "values": detection["values"][index]}
        if index in found.details:
            detail = found.details[index]
            row |= {"words": detail.words, "curve": detail.curve, "curve_timesteps": detail.curve_timesteps}
        rows.append(row)
    return {
        "threshold": found.threshold,
        "threshold_source": found.threshold_source,
        "metric": detection["metric"],
        "columns": detection["columns"],
        "seeds": detection["seeds"],
        "prompts": rows,
    }


def _print_table(found: Scan) -> None:
    rows = _rows(found)
    verdict = {True: "memorized", False: "fresh", None: "-"}
    click.echo(f"{'rank':>5} {'score':>9}  {'verdict':<10} prompt")
    for row in rows[:SHOWN]:
        prompt = printable(row["prompt"])[:70]
        click.echo(f"{row['rank']:>5} {row['score']:>9.4f}  {verdict[row['memorized']]:<10} {prompt}")
    if len(rows) > SHOWN:
        click.echo(f"      and {len(rows) - SHOWN} more in scores.csv")
    if found.threshold is None:
        click.echo(
            "no verdicts: give --calibration, --threshold, or --fresh with prompts known not to be memorized"
        )
    else:
        count = sum(bool(row["memorized"]) for row in rows)
        limit = f"threshold {found.threshold:.4f} ({found.threshold_source})"
        click.echo(f"{count} of {len(rows)} called memorized, {limit}")
