"""What purifying does on the embedded model: each method and its faster variants on protected pictures.

`python benchmarks/purify_quality.py [--pictures 4] [--json FILE]`

Pictures of two creatures that no model here was trained on are protected by `mist` at 8/255, and purified.

  psnr           of the purified to the clean pictures, dB
  displacement   of latents, |mu(x) - mu(clean)| / |mu(clean)|
  identity       how much pictures show the creature, by the testbed's judge
  quality        how clean they are, by the same
  passes         of the network for each row of pictures or boxes

Means over pictures; what the purifier makes of clean pictures is in the columns `clean_...`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import machine
from pumice import evaluate, protect, purify, testbed
from pumice.purify import filters

EPS, SUBJECTS = 8 / 255, (0, 1)


def methods() -> dict[str, tuple[Callable[[Tensor], Tensor], int | None]]:
    """By name what purifies, and how many passes of a network that takes for a row."""
    pipe, denoiser, upscaler = testbed.load(), testbed.load_denoiser(), testbed.load_upscaler()
    grid = partial(purify.gridpure, denoiser=denoiser)
    whole = partial(purify.diffpure, denoiser=denoiser, t=100, size="native")
    latent = partial(purify.latent_diffpure, pipe=pipe)
    prompted = partial(latent, prompt=purify.QUALITY_PROMPT.format("creature"))
    return {
        "none": (lambda x: x, None),
        "gridpure, one_shot": (partial(grid, sampler="one_shot"), 20),
        "gridpure, one_shot, 4 rounds": (partial(grid, sampler="one_shot", iterations=4), 4),
        "diffpure, t = 100": (whole, 100),
        "diffpure, dpmsolver++ in 10": (partial(whole, sampler="dpmsolver++", num_inference_steps=10), 10),
        "diffpure, one_shot": (partial(whole, sampler="one_shot"), 1),
        "diffpure, resized to 32 px": (partial(purify.diffpure, denoiser=denoiser, t=100), 100),
        "ddspure, eps = 8/255": (partial(purify.ddspure, denoiser=denoiser, eps=EPS), None),
        "pdm_pure": (partial(purify.pdm_pure, denoiser=denoiser), 10),
        "codesr": (partial(purify.codesr, upscaler=upscaler, class_name="creature"), 150),
        "codesr, guidance 1": (
            partial(purify.codesr, upscaler=upscaler, class_name="creature", guidance_scale=1.0),
            75,
        ),
        "jpeg 75": (filters.jpeg, None),
        "compress_and_resize": (filters.compress_and_resize, None),
        "median 3": (filters.median, None),
        "gaussian 1": (partial(filters.gaussian, sigma=1.0), None),
        "total_variation 0.05": (partial(filters.total_variation, weight=0.05), None),
        "adverse_cleaner": (filters.adverse_cleaner, None),
        "latent_diffpure, no prompt": (latent, 301),
        "latent_diffpure, quality prompt": (prompted, 602),
        "latent_diffpure, dpmsolver++ in 30": (partial(prompted, sampler="dpmsolver++"), 60),
        "latent_diffpure, one_shot": (partial(prompted, sampler="one_shot"), 2),
        "gridpure": (grid, 200),
        "impress, 300 steps": (partial(purify.impress, pipe=pipe, steps=300), None),
        "noisy_upscaling": (partial(purify.noisy_upscaling, upscaler=upscaler), 75),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=4, help="of each creature")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(machine.line("cpu"))
    pipe, trials = testbed.load(), [testbed.subject_trial(index) for index in SUBJECTS]
    clean = torch.cat([trial.pictures[: given.pictures] for trial in trials])
    protected = protect.mist(clean, pipe, eps=EPS)
    protected = (protected * 255).round() / 255

    def judged(images: Tensor) -> dict[str, float]:
        parts = list(zip(trials, images.split(given.pictures), strict=True))
        return {
            "psnr": float(-10 * (images - clean).square().mean().log10()),
            "displacement": float(evaluate.latent_displacement(images, clean, pipe).latent.mean()),
            "identity": float(torch.cat([trial.identity(part) for trial, part in parts]).mean()),
            "quality": float(torch.cat([trial.quality(part) for trial, part in parts]).mean()),
        }

    rows: list[dict[str, Any]] = []
    for name, (method, passes) in methods().items():
        found, kept = judged(method(protected)), judged(method(clean))
        rows.append({"method": name, "passes": passes, **found} | {f"clean_{k}": v for k, v in kept.items()})
        print(json.dumps(rows[-1]), flush=True)
        if given.json:
            described = {"machine": machine.describe("cpu"), "pictures": len(clean), "eps": EPS}
            given.json.write_text(json.dumps(described | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
