"""How well memorization detection separates, and what it costs.

`python benchmarks/e2e_memorization.py [--shape sd15] [--json FILE]`

On the testbed: AUC and TPR at 1 % FPR of memorized captions against fresh ones and against hard negatives
(new titles of the memorized kind, and captions buried in rare words), one seed and the first step, for each
of several seeds; prompts a second against two baselines in the same run. With `--shape sd15` a
Stable-Diffusion-1.5-shaped model with random weights
is timed instead: separation means nothing there.

Baselines, given the same prompts and noises, all scores compared with ours before anything is timed:
  loop       the first step as published: prompt by prompt, both branches in one call, batch 2 x seeds
  batched    the best plain set-up: both branches of many prompts in one call
  50 steps   the published procedure: the whole trajectory of every prompt, both branches, norms read at every
  step
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import machine
from pumice import memorization, models, testbed
from pumice.memorization import engine
from pumice.models import DiffusionModel, PromptEmbeds
from pumice.testbed import world

GUIDANCE = 7.5


def auc(positive: Tensor, negative: Tensor) -> float:
    """The share of pairs in the right order, ties half."""
    difference = positive.double()[:, None] - negative.double()[None]
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def tpr(positive: Tensor, negative: Tensor, fpr: float = 0.01) -> float:
    return float((positive > memorization.threshold_at(fpr, negative)).double().mean())


def separation(model: DiffusionModel, seeds: int) -> dict[str, Any]:
    known = [world.memorized(i).caption for i in range(world.MEMORIZED_COUNT)]
    negatives = {"fresh": world.fresh_captions(500, seed=2000), "hard": world.hard_captions(500, seed=2000)}
    scores = {
        name: memorization.detect(model, prompts, seeds=seeds).magnitudes[:, :, 0]
        for name, prompts in {"memorized": known, **negatives}.items()
    }
    found: dict[str, Any] = {}
    for name in negatives:
        one = [(scores["memorized"][:, s], scores[name][:, s]) for s in range(seeds)]
        mean = (scores["memorized"].mean(1), scores[name].mean(1))
        found[name] = {
            "auc_one_seed": [auc(*pair) for pair in one],
            "tpr_at_1_percent_one_seed": [tpr(*pair) for pair in one],
            f"auc_{seeds}_seeds": auc(*mean),
            f"tpr_at_1_percent_{seeds}_seeds": tpr(*mean),
        }
    found["score_ranges"] = {
        name: [float(x) for x in (s.mean(1).min(), s.mean(1).median(), s.mean(1).max())]
        for name, s in scores.items()
    }
    return found


@torch.inference_mode()
def loop(model: DiffusionModel, prompts: list[str], seeds: int, steps: int) -> Tensor:
    """The published procedure: every prompt by itself, norms read back at every step."""
    noise = engine.initial_noise(range(seeds), model.latent_shape()).to(model.device)
    scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config)
    scheduler.set_timesteps(50)
    found = []
    for prompt in prompts:
        both = PromptEmbeds.cat([model.unconditional(), model.encode_prompt(prompt)]).repeat(seeds)
        x, norms = noise, []
        for t in scheduler.timesteps[:steps]:
            uncond, cond = model.predict(torch.cat([x, x]), t, both).float().chunk(2)
            difference = model.schedule.to_epsilon(cond, x, t) - model.schedule.to_epsilon(uncond, x, t)
            norms.append([float(d.norm()) for d in difference])
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x).prev_sample
        found.append(torch.tensor(norms).T)
    return torch.stack(found)


@torch.inference_mode()
def batched(model: DiffusionModel, prompts: list[str], seeds: int, rows: int) -> Tensor:
    """First step, both branches of all prompts in calls of `rows`."""
    noise = engine.initial_noise(range(seeds), model.latent_shape()).to(model.device)
    embeds, uncond = model.encode_prompt(prompts), model.unconditional()
    t = model.schedule.timesteps(50)[0]
    found = []
    for first in range(0, len(prompts) * seeds, rows // 2):
        row = torch.arange(first, min(first + rows // 2, len(prompts) * seeds))
        x = noise[row % seeds]
        both = PromptEmbeds.cat([uncond.repeat(len(row)), embeds[(row // seeds).tolist()]])
        without, cond = model.predict(torch.cat([x, x]), t, both).float().chunk(2)
        scale = model.schedule.epsilon_scale(t).item()
        found.append((cond - without).flatten(1).norm(dim=1) * scale)
    return torch.cat(found).cpu().reshape(len(prompts), seeds, 1)


def seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()  # ends with a copy to the host, so the device is done
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def speed(model: DiffusionModel, prompts: list[str], seeds: int, batch_size: int, few: int) -> dict[str, Any]:
    """Prompts a second; `few` prompts for the slow 50-step baseline."""

    def ours() -> Tensor:
        return memorization.detect(model, prompts, seeds=seeds, batch_size=batch_size).magnitudes

    tolerance = {"rtol": 1e-3, "atol": 1e-3} if model.dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}
    expected = ours()  # also the warm-up
    torch.testing.assert_close(loop(model, prompts[:8], seeds, 1), expected[:8], **tolerance)
    torch.testing.assert_close(batched(model, prompts, seeds, batch_size), expected, **tolerance)
    torch.testing.assert_close(loop(model, prompts[:few], seeds, 50)[:, :, :1], expected[:few], **tolerance)
    count = len(prompts)
    rates = {
        "ours": count / seconds(ours, 3),
        "loop": count / seconds(lambda: loop(model, prompts, seeds, 1), 3),
        "batched": count / seconds(lambda: batched(model, prompts, seeds, batch_size), 3),
        "50 steps": few / seconds(lambda: loop(model, prompts[:few], seeds, 50), 1),
    }
    return {
        "prompts": count,
        "seeds": seeds,
        "batch_size": batch_size,
        "prompts_per_s": rates,
        "times_faster_than": {name: rates["ours"] / rate for name, rate in rates.items() if name != "ours"},
    }


def sd15(device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's sizes, random weights; the autoencoder, which nothing here uses, is small."""
    tiny = testbed.tiny_pipeline("sd1")
    text = CLIPTextConfig(
        vocab_size=len(tiny.tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=tiny.tokenizer.bos_token_id,
        eos_token_id=tiny.tokenizer.eos_token_id,
        pad_token_id=tiny.tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        text_encoder = CLIPTextModel(text)
        vae = AutoencoderKL(
            latent_channels=4,
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    parts = {**tiny.components, "unet": unet, "text_encoder": text_encoder, "vae": vae}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device=device, dtype=dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    for part in (pipe.unet, pipe.text_encoder):
        part.eval()
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shape", choices=["testbed", "sd15"], help="default: sd15 on a GPU, else the testbed"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    shape = arguments.shape or ("sd15" if device == "cuda" else "testbed")
    prompts = world.fresh_captions(128, seed=3000)
    found: dict[str, Any] = {"model": shape}
    if shape == "testbed":
        model = models.load(testbed.load(device=device))
        found["separation"] = separation(model, seeds=4)
        found["speed"] = speed(model, prompts, seeds=4, batch_size=32, few=4)
    else:
        model = models.load(sd15(device, torch.float16 if device == "cuda" else torch.float32))
        found["speed"] = speed(model, prompts, seeds=4, batch_size=64, few=4)
    print(machine.line(device))
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine.describe(device), **found}, indent=1))


if __name__ == "__main__":
    main()
