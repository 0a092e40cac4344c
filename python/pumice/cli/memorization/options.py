"""Options that several of these commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pumice.cli.options import options

if TYPE_CHECKING:  # importing it takes seconds, which --help should not
    from pumice.memorization.metric import Metric

METRICS = ("magnitude", "anisotropy", "sharpness", "attention_entropy", "bright_ending")
GUARDS = ("embedding", "dynamic_guidance", "initial_noise", "attention_rescaling", "refuse")


score_options = options(
    click.option("--metric", type=click.Choice(METRICS), help="By default magnitude."),
    click.option(
        "--steps",
        type=click.IntRange(min=1),
        help="Denoising steps that magnitude and sharpness look at, by default 1.",
    ),
    click.option("--seeds", type=click.IntRange(min=1), help="Initial noises a prompt, by default 4."),
    click.option("--num-inference-steps", type=click.IntRange(min=1), help="Of the sampler, by default 50."),
    click.option(
        "--guidance-scale", type=float, help="Of the sampler, from its second step on, by default 7.5."
    ),
    click.option(
        "--height", type=click.IntRange(min=1), help="Of the pictures, in px; by default the model's."
    ),
    click.option(
        "--width", type=click.IntRange(min=1), help="Of the pictures, in px; by default the model's."
    ),
    click.option(
        "--batch-size",
        default=32,
        show_default=True,
        type=click.IntRange(min=1),
        help="Rows in a call of the denoiser.",
    ),
)


def chosen_metric(metric: str | None, steps: int | None) -> Metric | str | None:
    """The metric of --metric and --steps; None leaves it to the calibration."""
    from pumice.memorization import Magnitude, Sharpness

    if steps is None:
        return metric
    kinds: dict[str | None, Any] = {None: Magnitude, "magnitude": Magnitude, "sharpness": Sharpness}
    if metric not in kinds:
        raise ValueError(f"--steps: got {steps}, which {metric} does not take")
    return kinds[metric](steps=steps)
