"""A memorization scan as one self-contained HTML page."""

from __future__ import annotations

import math
from typing import Any

from pumice.jobs import Scan

from .page import number, picture, render

BINS = 30
PAGE = 200  # rows that the script shows at a time: a browser takes seconds to lay out ten thousand

# What each score says, for people who have not read the papers.
MEANINGS = {
    "magnitude": "The score is how strongly a prompt pulls the denoising away from the unconditional "
    'prediction, |ε(prompt) − ε("")| (Wen et al., 2024).',  # noqa: RUF001
    "anisotropy": "The score adds up how strongly a prompt pulls pure noise away from the unconditional "
    "prediction at the first timestep, and how far that pull points along the prediction at a late one "
    "(Asthana and Belagiannis, 2026).",
    "sharpness": "The score is how fast a prompt's pull changes along its own direction: how narrow the "
    "peak is that the prompt leads to (Jeon et al., 2025).",
    "attention_entropy": "The score is how widely the picture's cross-attention scatters over the tokens "
    "of a prompt, as an entropy (Ren et al., 2024).",
    "bright_ending": "The score is how strongly a prompt pulls the denoising away from the unconditional "
    "prediction, where the finished picture attends to the prompt's end token (Chen et al., 2025).",
}


def scan_page(scan: Scan, *, model: str, prompts: str, details: dict[str, Any]) -> str:
    """The page: what was scanned, a histogram of the scores, all prompts by rank, and what is known of each.

    Prompts can be sorted, searched and opened; without scripts the table is there all the same.

    Args:
        model, prompts: what was scanned, in words.
        details: of the run, shown at the end as they are.

    Returns:
        HTML without any link to another file. Every text in it is escaped.
    """
    detection, verdicts = scan.detection, scan.memorized
    scores = detection.scores.tolist()
    highest = max([score for score in scores if math.isfinite(score)], default=0.0)
    rows = [
        {
            "rank": rank,
            "number": index + 1,
            "prompt": detection.prompts[index],
            "score": scores[index],
            "share": min(max(scores[index] / max(highest, 1e-9), 0.0), 1.0),
            "memorized": verdicts[index],
            "truncated": detection.truncated[index],
            "picture": scan.details[index].picture if index in scan.details else None,
        }
        for rank, index in enumerate(scan.order, 1)
    ]
    return render(
        "scan.html",
        script="scan.js",
        model=model,
        prompts=prompts,
        details=details,
        meaning=MEANINGS[detection.metric],
        some_seeds_spared=bool(detection.seed_scores.isnan().any()),
        rows=rows,
        page=PAGE,
        pictures=any(row["picture"] for row in rows),
        scan=scan,
        memorized_count=sum(verdict is True for verdict in verdicts),
        histogram=_histogram(scores, verdicts, scan.threshold),
        data=_data(scan),
    )


def _data(scan: Scan) -> dict[str, Any]:
    """What the script knows beyond the table: of the scan, and of the prompts in the table's order."""
    detection = scan.detection
    seed_scores = detection.seed_scores.tolist()
    prompts = []
    for index in scan.order:
        known: dict[str, Any] = {"seedScores": [number(score) for score in seed_scores[index]]}
        detail = scan.details.get(index)
        if detail is not None and detail.words is not None:
            known["words"] = [[text, number(score)] for text, score in detail.words]
        if detail is not None and detail.curve is not None:
            known["curve"] = [number(value) for value in detail.curve]
            known["timesteps"] = detail.curve_timesteps
        if detail is not None and detail.guarded is not None:
            known["guarded"] = picture(detail.guarded)
        prompts.append(known)
    # The curve is of magnitudes: a threshold of another score has no place in it.
    threshold = scan.threshold if detection.metric == "magnitude" else None
    return {"page": PAGE, "seeds": detection.seeds, "threshold": threshold, "prompts": prompts}


def _histogram(
    scores: list[float], verdicts: tuple[bool | None, ...], threshold: float | None
) -> dict[str, Any]:
    """`BINS` equal bins between round numbers around all scores; positions are shares of the axes."""
    finite = [score for score in scores if math.isfinite(score)]
    marks = [*finite, *([] if threshold is None else [threshold])] or [0.0]
    low, high = min(marks), max(marks)
    span = max(high - low, abs(high) / 10, 1e-6)  # all scores may be the same
    unit = 10 ** math.floor(math.log10(span))
    tick = next(unit * m for m in (0.2, 0.5, 1, 2) if span / (unit * m) <= 8)
    first, last = math.floor(low / tick), math.ceil(high / tick + 1e-9)
    start, width = first * tick, (last - first) * tick
    counts = [[0, 0] for _ in range(BINS)]
    for score, verdict in zip(scores, verdicts, strict=True):
        if math.isfinite(score):
            counts[min(int((score - start) / width * BINS), BINS - 1)][verdict is True] += 1
    tallest = max(sum(pair) for pair in counts) or 1
    return {
        "tallest": tallest,
        "bars": [
            {
                "x": i / BINS,
                "width": 1 / BINS,
                "plain": plain / tallest,
                "memorized": memorized / tallest,
                "title": f"{start + width * i / BINS:.3g} to {start + width * (i + 1) / BINS:.3g}: "
                f"{plain + memorized} prompts",
            }
            for i, (plain, memorized) in enumerate(counts)
            if plain + memorized
        ],
        "ticks": [
            {"x": (k - first) / (last - first), "label": f"{k * tick:.3g}"} for k in range(first, last + 1)
        ],
        "threshold": None if threshold is None else (threshold - start) / width,
    }
