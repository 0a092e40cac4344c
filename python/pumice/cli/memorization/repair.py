"""`pumice memorization repair`: take what memorized prompts replay out of the model."""

from __future__ import annotations

from pathlib import Path

import click

from pumice.cli.options import model_options, open_model, output_file


@click.command()
@click.argument("memorized", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The edit (.safetensors) to write."
)
@click.option("--method", default="wanda", show_default=True, type=click.Choice(["wanda", "nemo"]))
@click.option(
    "--sparsity",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Of wanda: the share of each row's weights that a step may select.",
)
@click.option(
    "--fresh",
    type=click.Path(path_type=Path),
    help="Of nemo: a list of prompts that are not memorized. The testbed brings its own.",
)
@click.option(
    "--save-model",
    type=click.Path(path_type=Path),
    help="Also save the repaired model, as a diffusers folder.",
)
@model_options
def repair(
    memorized: Path,
    out: Path,
    *,
    method: str,
    sparsity: float,
    fresh: Path | None,
    save_model: Path | None,
    model: str,
    dtype: str,
    device: str | None,
    quiet: bool,
) -> None:
    """Find the weights that serve the prompts of a list, and write an edit that zeroes them.

    `pumice.models.Edit.load(OUT).apply(pipe)` puts it on, `remove` takes it off again.
    """
    from pumice import jobs, memorization, testbed
    from pumice.io import check_writable

    prompts = jobs.read_prompts(memorized)
    output_file(out, "--out")
    if save_model is not None:
        check_writable(save_model, "--save-model")
    if method == "nemo" and fresh is None and model != "testbed":
        raise ValueError(
            "--fresh: got none, expected a list of prompts that are not memorized, which nemo needs"
        )
    opened = open_model(model, dtype, device)
    if method == "wanda":
        edit = memorization.wanda(opened, prompts, sparsity=sparsity, progress=not quiet)
    else:
        others = testbed.fresh_prompts() if fresh is None else jobs.read_prompts(fresh)
        edit = memorization.nemo(opened, prompts, fresh=others, progress=not quiet)
    before = memorization.detect(opened, prompts).scores
    with edit.on(opened):
        after = memorization.detect(opened, prompts).scores
        if save_model is not None:
            opened.pipe.save_pretrained(save_model)
    edit.save(out)
    if not quiet:
        shares = edit.report()["zeroed"]
        for name, share in shares.items():
            click.echo(f"{share:8.3%}  {name}")
        click.echo(
            f"mean score of the {len(prompts)} prompts {before.mean():.4f} before, {after.mean():.4f} after; "
            "pumice memorization bench tells what they draw"
        )
    click.echo(f"edit: {out.resolve()}")
