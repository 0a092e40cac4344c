"""`pumice memorization explain`: which words of a prompt make a model replay a picture."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pumice.cli.options import model_options, open_model, output_file, printable, run_details


@click.command()
@click.argument("prompts", nargs=-1, required=True)
@click.option("--list", "listed", is_flag=True, help="PROMPTS are files (.txt, .csv, .jsonl) of prompts.")
@click.option("--out", type=click.Path(path_type=Path), help="A page to write, and beside it a .json.")
@click.option(
    "--seeds", default=4, show_default=True, type=click.IntRange(min=1), help="Initial noises a prompt."
)
@click.option("--steps", default=1, show_default=True, type=click.IntRange(min=1), help="Of the sampler.")
@click.option(
    "--wrt",
    default="input",
    show_default=True,
    type=click.Choice(["input", "embedding"]),
    help="Differentiate by what goes into the text encoder, or, as published, by what comes out.",
)
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1))
@model_options
def explain(
    prompts: tuple[str, ...],
    *,
    listed: bool,
    out: Path | None,
    seeds: int,
    steps: int,
    wrt: str,
    batch_size: int,
    model: str,
    dtype: str,
    device: str | None,
    quiet: bool,
) -> None:
    """Rank the words of PROMPTS by how much the prompt's pull depends on them."""
    from pumice import jobs, memorization, report
    from pumice.io import write_whole

    texts = [text for file in prompts for text in jobs.read_prompts(file)] if listed else list(prompts)
    if out is not None and out.suffix == ".json":
        raise ValueError(
            f"--out: got {str(out)!r}, expected the name of a page; the .json is written beside it"
        )
    if out is not None:
        output_file(out, "--out")
    opened = open_model(model, dtype, device)
    found = memorization.explain(
        opened,
        texts,
        seeds=seeds,
        steps=steps,
        wrt=wrt,  # type: ignore[arg-type]
        batch_size=batch_size,
        progress=not quiet,
    )
    if not quiet:
        for explanation in found:
            click.echo(f"{explanation.magnitude:.4f}  {printable(explanation.prompt)}")
            for word in explanation.ranking():
                click.echo(f"  {word.score:8.4f}  {printable(word.text)}")
    if out is not None:
        about = run_details(model, opened, seeds=seeds, steps=steps, wrt=wrt)
        write_whole(out, report.explain_page(found, model=model, details=about))
        data = {"run": about, "prompts": [explanation.to_dict() for explanation in found]}
        write_whole(out.with_suffix(".json"), json.dumps(data, indent=1))
        click.echo(f"report: {out.resolve()}")
