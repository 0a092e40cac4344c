"""What became of a folder of pictures, on the screen."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import click

from .options import printable

if TYPE_CHECKING:  # importing it takes seconds, which --help should not
    from pumice.jobs import Outcome

SHOWN = 40  # failures on the screen
FAILED = 1  # exit code


def print_table(found: Outcome) -> None:
    psnr = [line["psnr"] for line in found.lines if line.get("psnr") is not None]
    kinds = Counter(PurePosixPath(name).suffix or PurePosixPath(name).name for name in found.skipped)
    skipped = ", ".join(f"{printable(kind)} {count}" for kind, count in kinds.most_common(5))
    rows = [
        ("done", str(found.done)),
        ("failed", str(found.failed)),
        ("skipped", f"{len(found.skipped)}" + (f" ({skipped})" if skipped else "")),
    ]
    if psnr:
        rows.append(("median PSNR", f"{statistics.median(psnr):.1f} dB"))
    if found.seconds is not None:
        rows.append(("s per picture", f"{found.seconds:.2f}"))
    for name, value in rows:
        click.echo(f"{name:<14}  {value}")


def print_failures(found: Outcome) -> None:
    failures = [line for line in found.lines if line["status"] == "failed"]
    for line in failures[:SHOWN]:
        click.echo(f"failed: {printable(line['source'])}: {printable(line['reason'])}", err=True)
    if len(failures) > SHOWN:
        click.echo(f"failed: {len(failures) - SHOWN} more in the manifest", err=True)
