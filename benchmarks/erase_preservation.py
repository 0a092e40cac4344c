"""Whether adversarial preservation keeps more of a model than plain erasure does, at equal erasure.

`python benchmarks/erase_preservation.py [--seeds 3] [--json FILE]`

ESD and EAP erase "a ball" from the embedded model, with one learning rate, for several numbers of steps. Of
each edit: the share of pictures of balls that show none (ESR-1), the share of other pictures that still show
what they should (PSR-1), and 1 - MS-SSIM of those to the pictures of the model as it is. "At equal erasure"
are the first edits of each method that reach `LEAST`, if one does.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch

import end_to_end
import erasers
from pumice import erase, evaluate, testbed
from pumice.models import DiffusionModel, Edit

CONCEPT = "ball"
STEPS = (80, 160, 320)
LEAST = 75.0  # per cent, of ESR-1
PROMPTS = 32

METHODS: dict[str, Callable[..., Edit]] = {
    "esd": lambda m, text, words, **how: erase.esd(m, text, **how),
    "eap": lambda m, text, words, **how: erase.eap(m, text, words, search_learning_rate=0.1, **how),
    "eap, without preserving": lambda m, text, words, **how: erase.eap(m, text, words, lamb=0, **how),
}


def of_seed(model: DiffusionModel, seed: int) -> dict[str, dict[int, dict[str, float]]]:
    """By method and number of steps, the rates."""
    text, words = erasers.WORDS[CONCEPT], erasers.vocabulary(CONCEPT)
    how: dict[str, Any] = {"learning_rate": 3e-4, "num_inference_steps": 20, "pending": 16, "seed": seed}
    edits = {
        f"{name}/{steps}": make(model, text, words, steps=steps, **how)
        for name, make in METHODS.items()
        for steps in STEPS
    }
    judged = testbed.trial(CONCEPT, PROMPTS, seed=seed)
    drawn = evaluate.erasure(
        model, edits, judged.erased, judged.preserved,
        classify=judged.classify, k=1, seeds=1, num_inference_steps=20, guidance_scale=5, batch_size=96,
    )  # fmt: skip
    rows = {row["name"]: row for row in drawn.rows}
    keys = ("esr_1", "psr_1", "distance_preserved")
    return {
        name: {steps: {key: rows[f"{name}/{steps}"][key] for key in keys} for steps in STEPS}
        for name in METHODS
    }


def at_equal_erasure(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each method the distance, seed by seed, of its first edit with an ESR-1 of `LEAST`."""
    found: dict[str, Any] = {}
    for name in METHODS:
        firsts = [next((row for row in seed[name].values() if row["esr_1"] >= LEAST), None) for seed in seeds]
        found[name] = {
            "distance": [row and row["distance_preserved"] for row in firsts],
            "psr_1": [row and row["psr_1"] for row in firsts],
            "mean_distance": statistics.fmean(row["distance_preserved"] for row in firsts if row)
            if any(firsts)
            else None,
        }
    return found


def main() -> None:
    parser = end_to_end.arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    given = end_to_end.parse(parser)
    model = end_to_end.load(given.device, "testbed")
    warnings.simplefilter("ignore", erase.ErasureWarning)
    seeds: list[dict[str, Any]] = []

    def part(seed: int) -> dict[str, Any]:
        seeds.append(of_seed(model, seed))
        return seeds[-1]

    parts = {f"seed {seed}": lambda seed=seed: part(seed) for seed in range(given.seeds)}
    end_to_end.record(given, {**parts, "at equal erasure": lambda: at_equal_erasure(seeds)})


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
