"""What a step of erasure by training costs, against the published loops.

`python benchmarks/e2e_erase_training.py [--shape testbed|sd15] [--steps N] [--json FILE]`

Baselines are the published algorithms (`published_erasure.py`) in float32 with our random numbers. Before
anything is timed, losses are compared: with one step at a time they are those of the published loop; with
several pending steps, whose latents are drawn by slightly older weights, their mean is.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import end_to_end
import published_erasure as published
from pumice import erase
from pumice.models import DiffusionModel, Edit

CONCEPT = "a ball"
RATE = 1e-4
PENDING = (1, 4, 8)


def esd(model: DiffusionModel, steps: int) -> dict[str, Any]:
    """Seconds a step, and losses of each loop."""
    return _against(
        lambda: published.esd(model, CONCEPT, steps, RATE)[0],
        lambda pending: erase.esd(
            model,
            CONCEPT,
            steps=steps,
            learning_rate=RATE,
            trajectory="code",
            pending=pending,
            allow_unknown=True,
        ),
        steps,
    )


def _against(theirs: Callable[[], list[float]], ours: Callable[[int], Edit], steps: int) -> dict[str, Any]:
    start = time.perf_counter()
    losses = theirs()
    baseline = (time.perf_counter() - start) / steps
    found: dict[str, Any] = {"published": {"seconds": baseline, "loss": statistics.fmean(losses)}}
    for pending in PENDING:
        edit = ours(pending)
        mine = edit.details["losses"]
        if pending == 1:
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(losses), rtol=2e-2, atol=1e-5)
        each = edit.details["seconds"] / steps
        found[f"pumice, {pending} pending"] = {
            "seconds": each,
            "loss": statistics.fmean(mine),
            "loss_ratio": statistics.fmean(mine) / statistics.fmean(losses),
            "times_faster": baseline / each,
        }
    return found


def main() -> None:
    parser = end_to_end.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=32)
    given = end_to_end.parse(parser)
    model = end_to_end.load(given.device, given.shape)
    warnings.simplefilter("ignore", erase.ErasureWarning)
    end_to_end.record(given, {"esd": lambda: esd(model, given.steps)})


if __name__ == "__main__":
    main()
