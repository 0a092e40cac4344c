"""How many steps of the red team tell a model that knows a picture from one that can be talked into it.

`python benchmarks/e2e_dori.py [--json FILE]`, on the testbed

DoRI's embeddings for memorized pictures, and for ordinary pictures that the model never saw, from their own
prompts and from random embeddings. Of each, the share of pictures that come back (similarity above the
testbed's REPLAYED for either of two seeds; 25 steps, guidance 5).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import end_to_end
from pumice import testbed
from pumice.memorization import dori
from pumice.models import DiffusionModel
from pumice.testbed import world

PICTURES, STEPS, SEEDS = 12, (10, 50), 2
UNSEEN = 10**8  # numbers of ordinary pictures that training never reached


def pictures() -> dict[str, tuple[Tensor, list[str]]]:
    known = [world.memorized(i) for i in range(PICTURES)]
    unseen = [world.training_picture(UNSEEN + i) for i in range(PICTURES)]
    return {
        "memorized": (torch.from_numpy(np.stack([it.picture for it in known])), [it.caption for it in known]),
        "unseen": (torch.from_numpy(np.stack([it[1] for it in unseen])), [it[0] for it in unseen]),
    }


def come_back(model: DiffusionModel, embeds: Tensor, images: Tensor) -> dict[str, float]:
    found = []
    for seed in range(SEEDS):
        drawn = model.pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=model.unconditional().embeds.expand_as(embeds),
            generator=[torch.Generator().manual_seed(seed) for _ in images],
            num_inference_steps=25,
            guidance_scale=5.0,
            output_type="pt",
        ).images.cpu()
        found.append(testbed.similarity(drawn, images).diagonal())
    best = torch.stack(found).amax(0)
    return {"come_back": float((best > testbed.REPLAYED).double().mean()), "similarity": float(best.mean())}


def budgets(model: DiffusionModel) -> list[dict[str, Any]]:
    table = []
    for kind, (images, captions) in pictures().items():
        for start, prompts in (("prompt", captions), ("random", None)):
            for steps in STEPS:
                embeds = dori(model, images, prompts, steps=steps).prompt_embeds.embeds
                table.append(
                    {"pictures": kind, "start": start, "steps": steps, **come_back(model, embeds, images)}
                )
    return table


def main() -> None:
    given = end_to_end.parse(end_to_end.arguments(__doc__))
    given.shape = "testbed"  # separation means nothing with random weights
    model = end_to_end.load(given.device, given.shape)
    end_to_end.record(given, {"budgets": lambda: budgets(model)})


if __name__ == "__main__":
    main()
