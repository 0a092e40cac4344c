"""A memorization scan as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from pumice.jobs import Scan

BINS = 30
PICTURE_PX = 192  # larger pictures are shrunk to it


def scan_page(scan: Scan, *, model: str, prompts: str, details: dict[str, Any]) -> str:
    """The page: what was scanned, a histogram of the scores, all prompts by rank with their pictures.

    Args:
        model, prompts: what was scanned, in words.
        details: of the run, shown at the end as they are.

    Returns:
        HTML without any link to another file. Every text in it is escaped.
    """
    detection, verdicts = scan.detection, scan.memorized
    scores = detection.scores.tolist()
    per_seed = detection.magnitudes.mean(2).tolist()
    rows = [
        {
            "rank": rank,
            "prompt": detection.prompts[index],
            "score": scores[index],
            "per_seed": per_seed[index],
            "memorized": verdicts[index],
            "truncated": detection.truncated[index],
            "picture": _data_uri(scan.pictures[index]) if index in scan.pictures else None,
        }
        for rank, index in enumerate(scan.order, 1)
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pumice.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("scan.html").render(
        model=model,
        prompts=prompts,
        details=details,
        rows=rows,
        scan=scan,
        memorized_count=sum(verdict is True for verdict in verdicts),
        histogram=_histogram(scores, verdicts, scan.threshold),
    )


def _data_uri(path: Path) -> str:
    image = Image.open(path)
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _histogram(
    scores: list[float], verdicts: tuple[bool | None, ...], threshold: float | None
) -> dict[str, Any]:
    """`BINS` equal bins from 0 to a round number past the highest score; positions are shares of the axes."""
    finite = [score for score in scores if math.isfinite(score)]
    top = max([*finite, threshold or 0.0, 1e-6])
    unit = 10 ** math.floor(math.log10(top))
    tick = next(unit * m for m in (0.2, 0.5, 1, 2) if top / (unit * m) <= 8)
    end = tick * math.ceil(top / tick + 1e-9)
    counts = [[0, 0] for _ in range(BINS)]
    for score, verdict in zip(scores, verdicts, strict=True):
        if math.isfinite(score):
            counts[min(int(score / end * BINS), BINS - 1)][verdict is True] += 1
    tallest = max(sum(pair) for pair in counts) or 1
    return {
        "tallest": tallest,
        "bars": [
            {
                "x": i / BINS,
                "width": 1 / BINS,
                "plain": plain / tallest,
                "memorized": memorized / tallest,
                "title": f"{end * i / BINS:.3g} to {end * (i + 1) / BINS:.3g}: {plain + memorized} prompts",
            }
            for i, (plain, memorized) in enumerate(counts)
            if plain + memorized
        ],
        "ticks": [{"x": i * tick / end, "label": f"{i * tick:.3g}"} for i in range(round(end / tick) + 1)],
        "threshold": None if threshold is None else threshold / end,
    }
