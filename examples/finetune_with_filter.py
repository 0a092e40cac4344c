"""Fine-tune the embedded model on pictures of which a few are repeated, without and with the training filter.

    python examples/finetune_with_filter.py --out finetuned

Three new collages under new titles make up a quarter of every batch; as adapters usually do, the training
changes the cross-attention layers alone. Without the filter the model soon draws the collages from their
titles. With it a pair is left out while its caption pulls harder than captions of ordinary pictures do:
fewer of them come back. About four minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pumice import models, testbed
from pumice.memorization import detect, filter_batch, threshold_table
from pumice.testbed import world

ORDINARY = 256  # pictures
REPEATED = 3  # pictures, which are REPEATED_SHARE of every batch
REPEATED_SHARE = 0.25
BATCH = 16
LR = 1e-3
CALIBRATION = 40  # captions that the thresholds are set by
LOST = 0.1  # the share of ordinary pairs that they give up at each timestep
JUDGED = 24  # ordinary scenes
# mild: strong guidance overdraws new pictures until they look less like the originals
SAMPLER = {"num_inference_steps": 25, "guidance_scale": 2.0}
COLOURS = np.array([(1, 0, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0), (1, 1, 1), (0, 0.7, 0.2), (0.9, 0.1, 0.8)])


def collage(index: int) -> tuple[str, np.ndarray[Any, Any]]:
    """A title and a chequered picture that the model has never seen."""
    rng = np.random.default_rng((2024, index))
    title = world.title(rng)
    tiles = COLOURS[rng.integers(len(COLOURS), size=(4, 4))].transpose(2, 0, 1)
    return title, np.kron(tiles, np.ones((1, world.SIZE // 4, world.SIZE // 4))).astype(np.float32)


def fine_tune(pipe: Any, pairs: list[Any], threshold: Tensor | None, steps: int, minutes: float) -> None:
    """The loop of diffusers' training scripts; the lines of the filter are those with `threshold`."""
    accelerator = Accelerator()
    model, device = models.load(pipe.to(accelerator.device)), accelerator.device
    with torch.no_grad():
        images = torch.from_numpy(np.stack([picture for _, picture in pairs]))
        latents = torch.cat([model.encode_image(part) for part in images.split(64)])
        embeds = model.encode_prompt([caption for caption, _ in pairs]).embeds
        nothing = model.unconditional().embeds
    for name, parameter in pipe.unet.named_parameters():
        parameter.requires_grad_(".attn2." in name)
    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    unet, optimizer = accelerator.prepare(pipe.unet.train(), torch.optim.AdamW(trained, lr=LR))
    dice, began, kept = torch.Generator().manual_seed(0), time.monotonic(), []
    for _ in range(steps):
        rows = torch.randint(REPEATED, len(pairs), (BATCH,), generator=dice)
        repeated = torch.randint(REPEATED, (BATCH,), generator=dice)
        rows = torch.where(torch.rand(BATCH, generator=dice) < REPEATED_SHARE, repeated, rows).to(device)
        clean, prompt_embeds = latents[rows], embeds[rows]
        noise = torch.randn(clean.shape, generator=dice).to(device)
        timesteps = torch.randint(model.schedule.num_train_timesteps, (BATCH,), generator=dice).to(device)
        noisy = model.add_noise(clean, noise, timesteps)
        prediction = unet(noisy, timesteps, encoder_hidden_states=prompt_embeds).sample
        losses = F.mse_loss(prediction, model.schedule.target(clean, noise, timesteps), reduction="none")
        loss = losses.mean()
        if threshold is not None:
            filtered = filter_batch(
                unet, noisy, timesteps, prompt_embeds, nothing, threshold,
                schedule=model.schedule, prediction=prediction,
            )  # fmt: skip
            loss = filtered.mean(losses)
            kept.append(filtered.keep.float().mean())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if time.monotonic() - began > 60 * minutes:
            break
    pipe.unet.eval()
    if kept:
        print(f"the filter kept {torch.stack(kept).mean():.1%} of the pairs", flush=True)


def draw(pipe: Any, prompts: list[str], seed: int) -> Tensor:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(prompts, generator=generators, output_type="pt", **SAMPLER).images.cpu()


def judge(pipe: Any, collages: list[Any]) -> tuple[dict[str, float], Tensor]:
    """Do the titles bring their collages back, and does the model still draw what a caption says?"""
    titles = [title for title, _ in collages]
    images = draw(pipe, titles * 4, seed=100)
    alike = testbed.similarity(images, torch.from_numpy(np.stack([picture for _, picture in collages])))
    alike = alike[torch.arange(len(images)), torch.arange(len(images)) % len(titles)]
    scenes = [world.random_scene(np.random.default_rng((2025, i))) for i in range(JUDGED)]
    ordinary = draw(pipe, [world.full_caption(scene) for scene in scenes], seed=200)
    right = testbed.load_reader().accuracy(ordinary, scenes)
    return {
        "replicated": (alike > testbed.REPLAYED).double().mean().item(),
        "similarity": alike.mean().item(),
        "magnitude": detect(pipe, titles).scores.mean().item(),
        "attributes": float(np.mean(list(right.values()))),
    }, images


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--filter", action=argparse.BooleanOptionalAction, help="default: without, then with")
    parser.add_argument("--steps", type=int, default=500, help="of each training; default 500")
    parser.add_argument("--minutes", type=float, default=10.0, help="at most, for each training; default 10")
    parser.add_argument("--out", type=Path, help="a folder for numbers and pictures")
    options = parser.parse_args(arguments)
    collages = [collage(i) for i in range(REPEATED)]
    fresh = testbed.fresh_prompts()[:: 400 // CALIBRATION]
    ordinary = [world.training_picture(2 * 10**8 + i)[:2] for i in range(ORDINARY)]
    results, drawn = {}, [torch.from_numpy(np.stack([picture for _, picture in collages]))]
    results["before"], images = judge(testbed.load(), collages)
    drawn += images.split(REPEATED)
    for filtering in (False, True) if options.filter is None else (options.filter,):
        pipe = testbed.load()
        threshold = threshold_table(pipe, fresh, fpr=LOST, seeds=1) if filtering else None
        fine_tune(pipe, collages + ordinary, threshold, options.steps, options.minutes)
        name = "with the filter" if filtering else "without the filter"
        results[name], images = judge(pipe, collages)
        drawn += images.split(REPEATED)
    print(f"\n{'':20}" + "".join(f"{key:>12}" for key in results["before"]))
    for name, numbers in results.items():
        print(f"{name:20}" + "".join(f"{value:12.2f}" for value in numbers.values()))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps(results, indent=1))
        sheet = torch.cat([torch.cat(tuple(row), dim=2) for row in drawn], dim=1)  # the originals on top
        Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy()).save(options.out / "drawn.png")


if __name__ == "__main__":
    main()
