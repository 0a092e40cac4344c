"""Protections, purifiers and recipes of training set against each other, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from pumice.evaluate import Matrix, Mismatch

from .page import embedded, render

SHOWN = 2  # drawings of each cell
_WIDTH, _HEIGHT, _MARGIN = 640, 360, 16  # of the plot
_MARKS = ("M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z", "M-4.5-4.5h9v9h-9Z", "M0-6 5.5 4.5h-11Z", "M0-6 6 0 0 6-6 0Z")
_HUES = (215, 25, 145, 320, 50, 265, 0, 180)


def matrix_page(
    found: Matrix, *, mismatch: Mismatch | None = None, model: str, details: dict[str, Any]
) -> str:
    """The page: one row a cell, under it what each cell learned from and drew, and what CLIP sees.

    Args:
        mismatch: of some of the pictures.
        model: what learned, in words.
        details: of the run, shown at the end as they are.

    Returns:
        HTML without any link to another file and without scripts. Every text in it is escaped.
    """
    sections: dict[str, dict[str, list[dict[str, Any]]]] = {}
    first = found.settings["subjects"][0]
    for (protection, purifier, recipe), drawn in found.drawn.items():
        figures = sections.setdefault(protection, {}).setdefault(purifier, [])
        if not figures:
            learned = found.pictures[first, protection, purifier]
            figures += [{"name": "learned", "picture": _address(each)} for each in learned[:SHOWN]]
        drawings = drawn[0, 0].flatten(0, 1)[:SHOWN]
        figures += [{"name": recipe, "picture": _address(each)} for each in drawings]
    return render(
        "matrix.html",
        model=model,
        details=details,
        rows=[{**row, "bar": _bar(row)} for row in found.rows],
        agreement=any(row["agreement"] is not None for row in found.rows),
        subjects=found.settings["subjects"],
        seeds=len(found.settings["seeds"]),
        sections=sections,
        mismatch=mismatch,
        plot=None if mismatch is None else scatter(mismatch),
    )


def mismatch_page(found: Mismatch, *, model: str, details: dict[str, Any]) -> str:
    """The page of a mismatch alone.

    Args:
        model: which CLIP, in words.
        details: of the run, shown at the end as they are.

    Returns:
        HTML as of `matrix_page`.
    """
    return render("mismatch.html", model=model, details=details, mismatch=found, plot=scatter(found))


def scatter(found: Mismatch) -> dict[str, Any]:
    """The points of all groups on a plot, both axes to the same scale."""
    every = [point for points in found.points.values() for point in points.tolist()]
    lows = [min(point[axis] for point in every) for axis in (0, 1)]
    spans = [max(point[axis] for point in every) - lows[axis] for axis in (0, 1)]
    room = (_WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN)
    scale = min(length / max(span, 1e-6) for length, span in zip(room, spans, strict=True))

    def place(point: Sequence[float]) -> tuple[str, str]:
        x, y = ((point[axis] - lows[axis] - spans[axis] / 2) * scale for axis in (0, 1))
        return f"{_WIDTH / 2 + x:.1f}", f"{_HEIGHT / 2 - y:.1f}"

    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "groups": [
            {
                "name": name,
                "hue": _HUES[number % len(_HUES)],
                "mark": _MARKS[number % len(_MARKS)],
                "points": [place(point) for point in points.tolist()],
                "middle": place(points.mean(0).tolist()),
            }
            for number, (name, points) in enumerate(found.points.items())
        ],
    }


def _bar(row: dict[str, Any]) -> dict[str, float] | None:
    """What is recovered, as shares of a bar from nothing to all."""
    if row["recovered"] is None:
        return None
    keys = ("recovered_low", "recovered", "recovered_high")
    low, at, high = (min(max(row["recovered"] if row[key] is None else row[key], 0.0), 1.0) for key in keys)
    return {"low": low, "at": at, "high": high}


def _address(pixels: Tensor) -> str:
    """A picture (3, H, W) uint8 as the address of an `<img>`."""
    return embedded(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
