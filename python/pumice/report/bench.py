"""A bench of mitigations as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pumice.memorization.bench import Bench

from .page import render


def bench_page(bench: Bench, *, model: str, details: dict[str, Any]) -> str:
    """The page: one row a mitigation, and for each prompt the training picture beside what each draws.

    Pictures are there if the bench kept them, that is if it had a folder.

    Args:
        model: what was judged, in words.
        details: of the run, shown at the end as they are, after the bench's own settings.

    Returns:
        HTML without any link to another file and without scripts. Every text in it is escaped.
    """
    drawn = [
        {
            "prompt": prompt,
            "reference": reference,
            "figures": _figures(index, bench.pictures, bench.similarities, bench.settings["replayed"]),
            "red_team": _figures(
                index, bench.red_team_pictures, bench.red_team_similarities, bench.settings["replayed"]
            ),
        }
        for index, (prompt, reference) in enumerate(
            zip(bench.prompts, bench.reference_pictures, strict=False)  # no pictures without a folder
        )
    ]
    settings = {name.replace("_", " "): value for name, value in bench.settings.items()}
    return render("bench.html", model=model, details=settings | details, bench=bench, drawn=drawn)


def _figures(
    index: int,
    pictures: Mapping[str, Sequence[Path]],
    similarities: Mapping[str, Tensor],
    replayed: float,
) -> list[dict[str, Any]]:
    """What each mitigation drew of one prompt: its picture nearest to a training picture, and how near."""
    figures = []
    for name, files in pictures.items():
        similarity = float(similarities[name][index].max())
        figures.append(
            {
                "name": name,
                "file": files[index],
                "similarity": similarity,
                "replayed": similarity > replayed,
            }
        )
    return figures
