"""`pumice memorization`: which prompts replay training pictures, why, and what to do about it."""

from __future__ import annotations

import click

from .bench import bench
from .calibrate import calibrate
from .explain import explain
from .repair import repair
from .scan import scan


@click.group()
def memorization() -> None:
    """Find, explain, and remove what a model replays of its training pictures."""


for command in (scan, explain, calibrate, repair, bench):
    memorization.add_command(command)
