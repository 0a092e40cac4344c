"""What Wanda pruning of memorized prompts costs.

`python benchmarks/e2e_wanda.py [--shape sd15] [--json FILE]`

From ten prompts to the masks of their feed-forward weights, on the testbed, or with `--shape sd15` on a
Stable-Diffusion-1.5-shaped model with random weights. Baselines, their masks compared with ours before
anything is timed:
  published  the published procedure: prompt by prompt, both branches, all 50 steps; a hook after every
             feed-forward computes its GEGLU again and copies it to the host, where rows are normalised and
             summed; the empty prompt as often as there are prompts; all scores of both sides sorted in full
  10 steps   the same, but only the 10 steps that the masks are made from

The published code samples by PNDM, in 51 calls; here all sample by DDIM in 50, so that masks can be equal.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import end_to_end
from end_to_end import seconds
from pumice import memorization
from pumice.memorization import engine
from pumice.models import DiffusionModel, PromptEmbeds
from pumice.testbed import world

GUIDANCE, SPARSITY, STEPS = 7.5, 0.01, 10

Masks = dict[str, Tensor]


def ours(model: DiffusionModel, prompts: list[str], batch_size: int) -> Masks:
    edit = memorization.wanda(model, prompts, sparsity=SPARSITY, steps=STEPS, batch_size=batch_size)
    return {name: change.mask() for name, change in edit.changes.items()}


@torch.inference_mode()
def published(model: DiffusionModel, prompts: list[str], steps: int) -> Masks:
    target = column_norms(model, prompts, steps)
    base = column_norms(model, [""] * len(prompts), steps)
    masks = {}
    for name in target:
        magnitude = model.unet.get_submodule(name).weight.float().abs().cpu()
        count, union = int(SPARSITY * magnitude.shape[1]), torch.zeros_like(magnitude, dtype=torch.bool)
        for step, (a_target, a_base) in enumerate(zip(target[name], base[name], strict=True)):
            scores, others = magnitude * a_target, magnitude * a_base
            order = scores.sort(dim=1, descending=True, stable=True).indices
            others.sort(dim=1, descending=True, stable=True)  # nobody reads it
            mask = torch.zeros_like(union).scatter(1, order[:, :count], True) & (scores > others)
            if step < STEPS:
                union |= mask
        masks[f"{name}.weight"] = union
    return masks


def column_norms(model: DiffusionModel, prompts: list[str], steps: int) -> dict[str, Tensor]:
    """Norms of the columns of normalised inputs, by layer (steps, columns) on the CPU."""
    blocks = {name: block for name, block in model.unet.named_modules() if name.endswith(".ff")}
    sums: dict[str, list[Tensor | float]] = {f"{name}.net.2": [0.0] * steps for name in blocks}
    step = 0

    def after(name: str, block: Any, inputs: tuple[Tensor, ...]) -> None:
        rows = block.net[0](inputs[0]).cpu().float().flatten(0, 1)
        rows = torch.nn.functional.normalize(rows, dim=1)
        sums[name][step] += rows.square().sum(0)

    hooks = [
        block.register_forward_hook(lambda block, inputs, _, name=name: after(f"{name}.net.2", block, inputs))
        for name, block in blocks.items()
    ]
    scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config)
    scheduler.set_timesteps(50)
    for prompt in prompts:
        both = PromptEmbeds.cat([model.unconditional(), model.encode_prompt(prompt)])
        x = engine.initial_noise([0], model.latent_shape()).to(model.device)
        for step in range(steps):
            t = scheduler.timesteps[step]
            uncond, cond = model.predict(torch.cat([x, x]), t, both).float().chunk(2)
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x).prev_sample
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(of).sqrt() for name, of in sums.items()}


def differing(a: Masks, b: Masks) -> float:
    """The share of the selected weights that only one of the two selects."""
    return sum(int((a[name] ^ b[name]).sum()) for name in a) / sum(int(mask.sum()) for mask in a.values())


def speed(model: DiffusionModel, prompts: list[str], batch_size: int) -> dict[str, Any]:
    masks = ours(model, prompts, batch_size)  # also the warm-up
    baseline = published(model, prompts, STEPS)
    # what rounding decides: other batches, in half precision other bits of every activation
    assert differing(masks, baseline) <= (0.0 if model.dtype == torch.float32 else 0.02)
    times = {
        "ours": seconds(lambda: ours(model, prompts, batch_size), 3),
        "published": seconds(lambda: published(model, prompts, 50), 1),
        "10 steps": seconds(lambda: published(model, prompts, STEPS), 1),
    }
    return {
        "prompts": len(prompts),
        "batch_size": batch_size,
        "weights_selected": sum(int(mask.sum()) for mask in masks.values()),
        "share_that_differs": differing(masks, baseline),
        "seconds": times,
        "times_faster_than": {name: t / times["ours"] for name, t in times.items() if name != "ours"},
    }


def main() -> None:
    given = end_to_end.parse(end_to_end.arguments(__doc__))
    model = end_to_end.load(given.device, given.shape)
    prompts = [world.memorized(i).caption for i in range(10)]
    end_to_end.record(given, {"speed": lambda: speed(model, prompts, batch_size=32)})


if __name__ == "__main__":
    main()
