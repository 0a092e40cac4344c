"""`pumice memorization calibrate`: at which score a prompt of a checkpoint is called memorized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pumice.cli.options import model_options, open_model, output_file

from .options import chosen_metric, score_options


@click.command()
@click.option(
    "--memorized",
    required=True,
    type=click.Path(path_type=Path),
    help="A list of prompts known to replay training pictures.",
)
@click.option(
    "--fresh", required=True, type=click.Path(path_type=Path), help="A list of prompts known not to."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .json to write.")
@click.option(
    "--fpr",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the fresh prompts that may score above the threshold.",
)
@score_options
@model_options
def calibrate(
    memorized: Path,
    fresh: Path,
    out: Path,
    *,
    fpr: float,
    metric: str | None,
    steps: int | None,
    model: str,
    dtype: str,
    device: str | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Set the threshold on one half of two lists of prompts, and measure it on the other half.

    `scan --calibration` decides by the file that it writes, on the same weights and settings alone.
    """
    from pumice import jobs, memorization

    known, others = jobs.read_prompts(memorized), jobs.read_prompts(fresh)
    output_file(out, "--out")
    found = memorization.calibrate(
        open_model(model, dtype, device),
        known,
        others,
        fpr=fpr,
        name=model,
        memorized_name=memorized.name,
        fresh_name=fresh.name,
        metric=chosen_metric(metric, steps),
        progress=not quiet,
        **settings,
    )
    found.save(out)
    if not quiet:
        auc, held_out = found.auc, found.held_out
        click.echo(f"threshold  {found.threshold:.4f}")
        click.echo(f"AUC        {auc['value']:.4f} [{auc['low']:.4f}, {auc['high']:.4f}]")
        for name, words in (("tpr", "memorized"), ("fpr", "fresh")):
            rate = held_out[name]
            click.echo(
                f"{name.upper()}        {rate['value']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}] "
                f"of {held_out[words]} held-out prompts of {getattr(found, words)['name']}"
            )
        at = [held_out[f"tpr_at_{fpr:g}_fpr_{convention}"] for convention in ("below", "nearest")]
        click.echo(f"TPR        {at[0]:.1%} at less than {fpr:.1%} FPR, {at[1]:.1%} at the FPR nearest to it")
    click.echo(f"calibration: {out.resolve()}")
