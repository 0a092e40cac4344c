"""How good the embedded model is, for docs/testbed.md. `python benchmarks/e2e_testbed.py [--json FILE]`

Attributes: 200 random scenes, each named in full, drawn by DDIM in 25 steps with guidance 5; an attribute
reader that was trained on drawn pictures tells what it sees. Its accuracy on drawn pictures, and on drawn
pictures that went through the autoencoder, are the ceilings.

Replay: the similarity of two pictures is the Pearson correlation of their 64 x 64 x 3 pixel values; a
memorized caption replays its training picture if it exceeds REPLAYED. The same for fresh captions against all
memorized pictures. What a
fresh caption draws may also be too near an ordinary training picture: its nearest neighbour among the first
NEIGHBOURS training pictures is compared with that of held-out drawn pictures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import machine
from pumice import models, testbed
from pumice.testbed import REPLAYED, similarity, world

SCENES = 200
STEPS, GUIDANCE = 25, 5.0
NEIGHBOURS = 20_000
HELD_OUT = 10**8  # numbers of ordinary pictures that training never reached


def generate(pipe: Any, prompts: list[str], seed: int) -> Tensor:
    """(N, 3, 64, 64) in [0, 1], eight at a time."""
    found = []
    for first in range(0, len(prompts), 8):
        batch = prompts[first : first + 8]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(batch))]
        images = pipe(
            batch, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="pt"
        )
        found.append(images.images.float().cpu())
    return torch.cat(found)


def drawn(count: int) -> tuple[Tensor, list[world.Scene]]:
    """Held-out ordinary pictures."""
    pictures = [world.training_picture(HELD_OUT + i) for i in range(count)]
    return torch.from_numpy(np.stack([picture for _, picture, _ in pictures])), [
        scene for *_, scene in pictures
    ]


def clip_accuracy(pictures: Tensor, scenes: list[world.Scene]) -> float:
    """How often CLIP finds the right one of all captions."""
    clip, tokenizer = testbed.load_clip()
    texts = sorted({world.full_caption(scene) for scene in scenes})
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        best = clip(input_ids=ids, pixel_values=pictures * 2 - 1).logits_per_image.argmax(1).tolist()
    return sum(texts[i] == world.full_caption(scene) for i, scene in zip(best, scenes, strict=True)) / len(
        scenes
    )


def nearest(pictures: Tensor) -> Tensor:
    """Similarity of each picture to the nearest ordinary training picture."""
    best = torch.full((len(pictures),), -1.0)
    for first in range(0, NEIGHBOURS, 1000):
        batch = np.stack([world.training_picture(first + i)[1] for i in range(1000)])
        best = torch.maximum(best, similarity(pictures, torch.from_numpy(batch)).amax(1))
    return best


def sheet(ordinary: Tensor, replays: Tensor, originals: Tensor) -> Image.Image:
    """Sixteen ordinary pictures, then eight replays, beside their training pictures; eight a row."""
    tiles = torch.cat([ordinary[:16], torch.stack([replays[:8], originals[:8]], dim=1).flatten(0, 1)])
    rows = tiles.reshape(4, 8, 3, world.SIZE, world.SIZE).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray((rows.clamp(0, 1) * 255).round().byte().numpy())
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)


def measure(device: str, sheet_file: Path | None) -> dict[str, Any]:
    start = time.perf_counter()
    pipe = testbed.load(device=device)
    found: dict[str, Any] = {"load_s": time.perf_counter() - start}
    reader = testbed.load_reader()
    rng = np.random.default_rng(77)
    scenes = [world.random_scene(rng) for _ in range(SCENES)]

    real, real_scenes = drawn(400)
    model = models.load(pipe)
    with torch.no_grad():
        decoded = torch.cat([model.decode_latents(model.encode_image(part)).cpu() for part in real.split(50)])
    found["reader_on_drawn"] = reader.accuracy(real, real_scenes)
    found["reader_on_autoencoded"] = reader.accuracy(decoded, real_scenes)
    found["autoencoder_mean_abs_error"] = 2 * float((decoded - real).abs().mean())  # in [-1, 1]

    pictures = generate(pipe, [world.full_caption(scene) for scene in scenes], seed=0)
    found["reader_on_generated"] = reader.accuracy(pictures, scenes)
    styled = [i for i, scene in enumerate(scenes) if scene.style]
    found["style_where_named"] = reader.accuracy(pictures[styled], [scenes[i] for i in styled])["style"]
    found["clip_on_generated"] = clip_accuracy(pictures, scenes)
    found["clip_on_drawn"] = clip_accuracy(real, real_scenes)

    known = [world.memorized(i) for i in range(world.MEMORIZED_COUNT)]
    originals = torch.from_numpy(np.stack([it.picture for it in known]))
    pairs = similarity(originals, originals).fill_diagonal_(-1)
    with torch.no_grad():
        through = model.decode_latents(model.encode_image(originals)).cpu()
    found["memorized_pairs_similarity_max"] = float(pairs.max())
    found["memorized_autoencoded_similarity_min"] = float(similarity(through, originals).diagonal().min())
    replayed = generate(pipe, [it.caption for it in known], seed=5000)
    if sheet_file:
        sheet(pictures, replayed, originals).save(sheet_file, optimize=True)
    replays = similarity(replayed, originals).diagonal()
    found["memorized_replayed"] = float((replays > REPLAYED).float().mean())
    found["memorized_similarity_min_median"] = [float(replays.min()), float(replays.median())]
    fresh = generate(
        pipe, world.fresh_captions(100, seed=2000) + world.hard_captions(100, seed=2000), seed=9000
    )
    near = similarity(fresh, originals).amax(1)
    found["fresh_replayed"] = float((near > REPLAYED).float().mean())
    found["fresh_similarity_max"] = float(near.max())
    found["nearest_training_picture_median"] = {
        "of generated": float(nearest(pictures).median()),
        "of held-out": float(nearest(real[:200]).median()),
    }

    times = []
    for _ in range(3):
        start = time.perf_counter()
        generate(pipe, ["a red ball at the beach"] * 8, seed=0)
        times.append(time.perf_counter() - start)
    found["batch_of_8_s"] = min(times)
    found["weights_MB"] = (
        sum(file.stat().st_size for file in testbed.WEIGHTS.parent.rglob("*") if file.is_file()) / 1e6
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="write a PNG of some of the pictures")
    arguments = parser.parse_args()
    found = measure(arguments.device, arguments.sheet)
    print(machine.line(arguments.device))
    for name, value in found.items():
        values = value if isinstance(value, dict) else {"": value}
        for key, number in values.items():
            numbers = number if isinstance(number, list) else [number]
            print(f"{name + ' ' + key:<45} {' '.join(f'{x:.3f}' for x in numbers)}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine.describe(arguments.device), **found}, indent=1)
        )


if __name__ == "__main__":
    main()
