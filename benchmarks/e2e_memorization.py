"""How well memorization detection separates, and what it costs.

`python benchmarks/e2e_memorization.py [--shape sd15] [--json FILE]`

On the testbed: AUC and TPR at 1 % FPR of memorized captions against fresh ones and against hard negatives
(new titles of the memorized kind, and captions buried in rare words). The magnitude at the first step for
each of several single seeds and for their mean; then every metric, one seed, with the choices of its paper.
Prompts a second against the baselines in the same run. With `--shape sd15` a Stable-Diffusion-1.5-shaped
model with random weights is timed instead: separation means nothing there. On a GPU also milliseconds a
prompt with calls of 32 rows and of 1, eager, compiled and as a CUDA graph, and the share of the time outside
the denoiser.

Baselines, given the same prompts and noises, all scores compared with ours before anything is timed:
  loop        the first step as published: prompt by prompt, both branches in one call, batch 2 x seeds
  batched     the best plain set-up: both branches of many prompts in one call
  50 steps    the published procedure: the whole trajectory of every prompt, both branches, norms read at
              every step
  anisotropy  as released: prompt by prompt, both branches at both timesteps, and both calls twice
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import end_to_end
from end_to_end import seconds
from pumice import memorization
from pumice.memorization import Anisotropy, AttentionEntropy, BrightEnding, Magnitude, Sharpness, engine
from pumice.memorization.statistics import auc, auc_interval, tpr_at_fpr
from pumice.models import DiffusionModel, PromptEmbeds
from pumice.testbed import world

GUIDANCE = 7.5
METRICS = {
    "magnitude, first step": Magnitude(),
    "magnitude, first 5 steps": Magnitude(5),
    "anisotropy": Anisotropy(),
    "sharpness, first step": Sharpness(),
    "sharpness, first 5 steps": Sharpness(5),
    "attention entropy, one layer": AttentionEntropy(),
    "attention entropy, 50 steps": AttentionEntropy(form="trajectory"),
    "bright ending": BrightEnding(),
}


def separation(model: DiffusionModel, seeds: int) -> dict[str, Any]:
    known = [world.memorized(i).caption for i in range(world.MEMORIZED_COUNT)]
    negatives = {"fresh": world.fresh_captions(500, seed=2000), "hard": world.hard_captions(500, seed=2000)}
    scores = {
        name: memorization.detect(model, prompts, seeds=seeds).seed_scores
        for name, prompts in {"memorized": known, **negatives}.items()
    }
    found: dict[str, Any] = {}
    for name in negatives:
        one = [(scores["memorized"][:, s], scores[name][:, s]) for s in range(seeds)]
        mean = (scores["memorized"].mean(1), scores[name].mean(1))
        found[name] = {
            "auc_one_seed": [auc(*pair) for pair in one],
            "tpr_at_1_percent_one_seed": [tpr_at_fpr(*pair) for pair in one],
            f"auc_{seeds}_seeds": auc(*mean),
            f"tpr_at_1_percent_{seeds}_seeds": tpr_at_fpr(*mean),
        }
    found["score_ranges"] = {
        name: [float(x) for x in (s.mean(1).min(), s.mean(1).median(), s.mean(1).max())]
        for name, s in scores.items()
    }
    return found


def metrics(model: DiffusionModel) -> dict[str, Any]:
    """Every metric from the noise of seed 0: 36 memorized captions against 100 fresh and 100 hard ones."""
    known = [world.memorized(i).caption for i in range(world.MEMORIZED_COUNT)]
    others = world.fresh_captions(100, seed=2000) + world.hard_captions(100, seed=2000)
    found = {}
    for name, metric in METRICS.items():
        start = time.perf_counter()
        positive, negative = (
            memorization.detect(model, prompts, metric=metric, seeds=1).scores for prompts in (known, others)
        )
        milliseconds = 1000 * (time.perf_counter() - start) / (len(known) + len(others))
        found[name] = {
            "auc": auc(positive, negative),
            "auc_95": auc_interval(positive, negative),
            "tpr_at_1_percent_below": tpr_at_fpr(positive, negative),
            "tpr_at_1_percent_nearest": tpr_at_fpr(positive, negative, convention="nearest"),
            "ms_per_prompt": milliseconds,
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
def anisotropy_as_released(model: DiffusionModel, prompts: list[str], seeds: int) -> Tensor:
    """(P, S, 2): each call is made twice, because the loop looks for its end after the next calls."""
    noise = engine.initial_noise(range(seeds), model.latent_shape()).to(model.device)
    timesteps = model.schedule.timesteps(50)
    found = []
    for prompt in prompts:
        both = PromptEmbeds.cat([model.unconditional(), model.encode_prompt(prompt)]).repeat(seeds)
        values = []
        for t in (timesteps[0], timesteps[-3]):
            for _ in range(2):
                outputs = model.predict(torch.cat([noise, noise]), t, both).float().chunk(2)
            uncond, cond = (model.schedule.to_epsilon(output, noise, t) for output in outputs)
            values.append((uncond, cond - uncond))
        norm = values[0][1].flatten(1).norm(dim=1)
        cosine = torch.cosine_similarity(*values[1], dim=1).mean((1, 2))
        found.append(torch.stack([norm, cosine], dim=1).cpu())
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


def speed(model: DiffusionModel, prompts: list[str], seeds: int, batch_size: int, few: int) -> dict[str, Any]:
    """Prompts a second; `few` prompts for the slow 50-step baseline."""

    def ours(metric: str = "magnitude") -> Tensor:
        return memorization.detect(model, prompts, metric=metric, seeds=seeds, batch_size=batch_size).values

    tolerance = {"rtol": 1e-3, "atol": 1e-3} if model.dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}
    expected, two = ours(), ours("anisotropy")  # also the warm-up
    torch.testing.assert_close(loop(model, prompts[:8], seeds, 1), expected[:8], **tolerance)
    torch.testing.assert_close(batched(model, prompts, seeds, batch_size), expected, **tolerance)
    torch.testing.assert_close(loop(model, prompts[:few], seeds, 50)[:, :, :1], expected[:few], **tolerance)
    torch.testing.assert_close(anisotropy_as_released(model, prompts[:8], seeds), two[:8], **tolerance)
    count = len(prompts)
    rates = {
        "ours": count / seconds(ours, 3),
        "loop": count / seconds(lambda: loop(model, prompts, seeds, 1), 3),
        "batched": count / seconds(lambda: batched(model, prompts, seeds, batch_size), 3),
        "50 steps": few / seconds(lambda: loop(model, prompts[:few], seeds, 50), 1),
    }
    anisotropy = {
        "ours": count / seconds(lambda: ours("anisotropy"), 3),
        "as released": count / seconds(lambda: anisotropy_as_released(model, prompts, seeds), 3),
    }
    return {
        "prompts": count,
        "seeds": seeds,
        "batch_size": batch_size,
        "prompts_per_s": rates,
        "times_faster_than": {name: rates["ours"] / rate for name, rate in rates.items() if name != "ours"},
        "anisotropy_prompts_per_s": anisotropy,
        "anisotropy_times_faster": anisotropy["ours"] / anisotropy["as released"],
    }


class Graphed(torch.nn.Module):
    """A denoiser replayed as one CUDA graph, for calls of one shape."""

    def __init__(
        self, unet: torch.nn.Module, rows: int, latent_shape: tuple[int, ...], embeds: Tensor
    ) -> None:
        super().__init__()
        self.unet, self.dtype, self.config = unet, unet.dtype, unet.config
        self.x = torch.zeros(rows, *latent_shape, device=unet.device, dtype=unet.dtype)
        self.t = torch.zeros((), device=unet.device, dtype=torch.int64)
        self.embeds = embeds.expand(rows, -1, -1).to(unet.dtype).contiguous()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is set up at a first call must not be captured
                self._call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self._call()

    def _call(self) -> Tensor:
        return self.unet(self.x, self.t, encoder_hidden_states=self.embeds, return_dict=False)[0]

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        if len(x) != len(self.x):
            return self.unet(x, t, encoder_hidden_states=encoder_hidden_states, return_dict=False)
        self.x.copy_(x)
        self.t.copy_(t)
        self.embeds.copy_(encoder_hidden_states)
        self.graph.replay()
        return (self.output.clone(),)


@contextmanager
def denoiser(model: DiffusionModel, kind: str, rows: int) -> Iterator[None]:
    """The model with its denoiser eager, compiled, or as a CUDA graph."""
    eager = model.unet
    try:
        if kind == "compiled":
            model.pipe.unet = torch.compile(eager)
        elif kind == "CUDA graph":
            embeds = model.unconditional().embeds
            model.pipe.register_modules(unet=Graphed(eager, rows, model.latent_shape(), embeds))
        yield
    finally:
        model.pipe.register_modules(unet=eager)


@torch.inference_mode()
def set_ups(model: DiffusionModel, prompts: list[str]) -> dict[str, Any]:
    """Milliseconds a prompt for one seed and the first step, and the share of them outside the denoiser."""
    found: dict[str, Any] = {}
    expected = memorization.detect(model, prompts, seeds=1).scores
    embeds = model.encode_prompt(prompts[0])
    for kind in ("eager", "compiled", "CUDA graph"):
        for rows in (32, 1):
            batch = prompts if rows > 1 else prompts[:32]
            x = torch.randn(rows, *model.latent_shape(), device=model.device)

            def screen(rows: int = rows, batch: list[str] = batch) -> Tensor:
                return memorization.detect(model, batch, seeds=1, batch_size=rows).scores

            def calls(rows: int = rows, batch: list[str] = batch, x: Tensor = x) -> None:
                for _ in range(1 + len(batch) // rows):  # the first is the unconditional one
                    model.predict(x, 981, embeds)
                torch.cuda.synchronize()

            with denoiser(model, kind, rows):
                torch.testing.assert_close(screen(), expected[: len(batch)], rtol=0.1, atol=0.3)
                calls()
                whole, alone = seconds(screen, 5), seconds(calls, 5)
            found[f"{kind}, {rows} rows"] = {
                "ms_per_prompt": 1000 * whole / len(batch),
                "share_outside_denoiser": max(0.0, 1 - alone / whole),
            }
    return found


def main() -> None:
    given = end_to_end.parse(end_to_end.arguments(__doc__))
    prompts, model = world.fresh_captions(128, seed=3000), end_to_end.load(given.device, given.shape)
    rows = 32 if given.shape == "testbed" else 64
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: speed(model, prompts, seeds=4, batch_size=rows, few=4)
    }
    if given.shape == "testbed":
        parts = {
            "separation": lambda: separation(model, seeds=4),
            "metrics": lambda: metrics(model),
        } | parts
    if given.device == "cuda":
        parts["set_ups"] = lambda: set_ups(model, prompts)
    end_to_end.record(given, parts)


if __name__ == "__main__":
    main()
