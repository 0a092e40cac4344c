"""What a step of erasure by training costs, against the published loops.

`python benchmarks/e2e_erase_training.py [--shape testbed|sd15] [--steps N] [--json FILE]`

Baselines are the published algorithms (`published_erasure.py`) in float32 with our random numbers. Losses are
compared beside the times: with one step at a time they are those of the published loop, step by step; with
several pending steps, whose latents are drawn by slightly older weights, `loss_ratio` compares their means.
`hours` is a whole training of the paper's length, at the rate of these steps.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import end_to_end
import erasers
import published_erasure as published
from pumice import erase
from pumice.erase.vocabulary import candidates
from pumice.models import DiffusionModel, Edit

CONCEPT = "a ball"
RATE = 1e-4
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "8 pending": {"pending": 8},
    "16 pending": {"pending": 16},
    "16 pending, bfloat16": {"pending": 16, "sample_dtype": torch.bfloat16},
}
"""How pumice runs, by name; the first as the published loop, but for what that wastes."""

WHOLE = {"esd": 1000, "eap": 1000, "age": 1000}
"""Steps of the weights in a published training."""


def esd(model: DiffusionModel, steps: int) -> dict[str, Any]:
    return _against(
        "esd",
        lambda: published.esd(model, CONCEPT, steps, RATE)[0],
        lambda **how: erase.esd(model, CONCEPT, steps=steps, **how),
        steps,
    )


def searched(model: DiffusionModel, steps: int, name: str) -> dict[str, Any]:
    """EAP or AGE: a step of the weights and one of the search together."""
    words = erasers.vocabulary("ball")
    (found,) = candidates(model, (CONCEPT,), words)
    theirs, ours = getattr(published, name), getattr(erase, name)
    return _against(
        name,
        lambda: theirs(model, CONCEPT, found, steps, RATE)[0],
        lambda **how: ours(model, CONCEPT, words, steps=steps, search_gradient="code", **how),
        steps,
    )


def _against(name: str, theirs: Callable[[], list[float]], ours: Callable[..., Edit], steps: int) -> Any:
    start = time.perf_counter()
    losses = theirs()
    baseline = (time.perf_counter() - start) / steps
    mean = statistics.fmean(losses)
    found: dict[str, Any] = {
        "published": {"seconds": baseline, "loss": mean, "hours": baseline * WHOLE[name] / 3600}
    }
    for way, how in WAYS.items():
        edit = ours(learning_rate=RATE, trajectory="code", allow_unknown=True, **how)
        mine = edit.details["losses"]
        if not how:
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(losses), rtol=5e-2, atol=1e-5)
        each = edit.details["seconds"] / steps
        found[way] = {
            "seconds": each,
            "loss": statistics.fmean(mine),
            "loss_ratio": statistics.fmean(mine) / mean,
            "times_faster": baseline / each,
            "sampled_a_second": edit.details["sample_passes"] / edit.details["seconds"],
            "hours": each * WHOLE[name] / 3600,
        }
    return found


def few_shot(model: DiffusionModel) -> dict[str, Any]:
    """One concept out of the text encoder, from four pictures that are drawn first."""
    start = time.perf_counter()
    words = erasers.vocabulary("ball")[:8]
    how: dict[str, Any] = {"steps": 60, "learning_rate": 2e-3, "word_weight": 0, "allow_unknown": True}
    edit = erase.few_shot(model, CONCEPT, anchor="a box", preserve=words, **how)
    return {"seconds": time.perf_counter() - start, "training": edit.details["seconds"]}


def main() -> None:
    parser = end_to_end.arguments(__doc__)
    parser.add_argument("--steps", type=int, help="default: 50 on a GPU, else 32")
    given = end_to_end.parse(parser)
    steps = given.steps or (50 if given.device == "cuda" else 32)
    model = end_to_end.load(given.device, given.shape)
    warnings.simplefilter("ignore", erase.ErasureWarning)
    end_to_end.record(
        given,
        {
            "esd": lambda: esd(model, steps),
            "eap": lambda: searched(model, steps, "eap"),
            "age": lambda: searched(model, steps, "age"),
            "few_shot": lambda: few_shot(model),
        },
    )


if __name__ == "__main__":
    main()
