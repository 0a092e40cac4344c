"""SPM: a one-dimensional adapter erases a concept and leaves random texts alone (Lyu et al., CVPR 2024)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pumice.erase.arguments import check_scale
from pumice.erase.trainer import Trainer, TrajectoryOptions, apart, noises
from pumice.models import DiffusionModel, Edit, PromptEmbeds, load
from pumice.models.arguments import checked_count, first_seed
from pumice.models.draws import Draws

_ATTENTION = re.compile(r"\.(attentions|attn\d)\.")
_RESTARTS = 3
_WARMUP = 1 / 6  # 500 of 3000 steps


@torch.inference_mode(False)
def spm(
    pipe: Any,
    concepts: str | Sequence[str],
    *,
    negative_guidance: float = 1.0,
    anchor_scale: float = 1000.0,
    num_anchors: int = 4,
    start_guidance: float = 3.0,
    num_inference_steps: int = 30,
    steps: int = 3000,
    learning_rate: float = 1e-4,
    **options: Unpack[TrajectoryOptions],
) -> Edit:
    """Erase concepts by adapters of rank one, which are held still at random texts.

    ::

        |epsilon'(z_t, t, c) - [epsilon(z_t, t, "") - eta (epsilon(z_t, t, c) - epsilon(z_t, t, ""))]|^2
            + lambda  mean over a of |epsilon'(z_t, t, a) - epsilon(z_t, t, a)|^2

        a = u |c| g / |g|      g ~ N(0, I)      u ~ U(0.8, 1.2)      kept with probability 1 - cos(a, c)

    a mean over elements; epsilon' trains, epsilon is the model as it was (Lyu et al., arXiv:2312.16145). z_t
    lies on a guided trajectory of c under epsilon'; texts are whole embeddings, norm and cosine those of all
    tokens together. `pumice.erase.transport` draws with several such edits, each as strong as the prompt is
    near to its concept. Adapters fit models that were fine-tuned from this one (`Edit.rebased`).

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them; the paper trains one.
        negative_guidance: eta. Default 1, of the paper.
        anchor_scale: lambda. Default 1000, of the paper.
        num_anchors: random texts a step. Default 4, of the paper's code.
        start_guidance: of trajectories. Default 3, of the paper's code.
        num_inference_steps: of a whole trajectory. Default 30, of the paper's code.
        steps: default 3000, of the paper.
        learning_rate: AdamW's, after a linear start of a sixth of the steps, in three falls of a cosine.
            Default 1e-4, of the paper.
        options: `pumice.erase.trainer.TrajectoryOptions`. `rank` is 1 unless given.

    Returns:
        An `Edit` of adapters at all linears and convolutions of transformer blocks, their projections in and
        out included.

    Differences from the released code: AdamW in 32 bits, not 8; the first matrices are Gaussian of variance
    1 / inputs; what the frozen model predicts is predicted once, without a second side of guidance.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, and if a loss
            or gradient is not finite, whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    eta = check_scale("negative_guidance", negative_guidance)
    anchor_scale = check_scale("anchor_scale", anchor_scale)
    num_anchors = checked_count("num_anchors", num_anchors)
    start_guidance = check_scale("start_guidance", start_guidance)
    options = {"rank": 1, **options}
    if options["rank"] is None:
        raise ValueError("rank: got None, expected one, of the adapters")
    original = load(pipe)
    trainer = Trainer(
        original,
        concepts,
        _layers(original),
        method="spm",
        settings={
            "negative_guidance": eta,
            "anchor_scale": anchor_scale,
            "num_anchors": num_anchors,
            "start_guidance": start_guidance,
            "num_inference_steps": num_inference_steps,
        },
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )
    model, student = trainer.model, trainer.student
    # what is kept of random texts depends on their angles: drawn on the CPU, nothing waits for the device
    cpu, seed = torch.device("cpu"), first_seed(options.get("seed", 0))
    draws = Draws([f"{seed}/erase/{row}" for row in range(trainer.count)], cpu)
    read_there = _to(cpu, trainer.encode(trainer.concepts))
    for name, weight in trainer.part.weights.items():
        if ".lora_A." in name:
            weight.data /= weight[0].numel() ** 0.5

    def drawn(step: int) -> PromptEmbeds:
        return trainer.encode(trainer.of_step(step))

    trajectories = trainer.trajectories(
        drawn, guidance_scale=start_guidance, num_inference_steps=num_inference_steps
    )

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        z, t = trajectories.at(step).of(rows)
        concepts = trainer.of_step(step)
        concept = trainer.encode(concepts)[rows]
        there = read_there[[trainer.concepts.index(concepts[row]) for row in rows]]
        others = [
            _to(model.device, random_texts(there, draws, rows, step, number)) for number in range(num_anchors)
        ]
        away, towards, *still = noises(model, z, t, trainer.encode([""]), concept, *others)
        read = PromptEmbeds.cat([concept, *others])
        times = 1 + num_anchors
        found, *held = student.predict_noise(z.repeat(times, 1, 1, 1), t.repeat(times), read).chunk(times)
        moved = sum(apart(now, before, trainer.count) for now, before in zip(held, still, strict=True))
        return apart(found, away - eta * (towards - away), trainer.count) + anchor_scale / num_anchors * moved

    return trainer.train(loss, learning_rate=_schedule(learning_rate, steps), weight_decay=1e-2)


def random_texts(
    concepts: PromptEmbeds, draws: Draws, rows: Sequence[int], step: int, number: int
) -> PromptEmbeds:
    """For each concept a random text of nearly its length, as `spm` has them; (B, L, D) like the concepts.

    draws: on the device of the concepts.
    """

    def near(what: str, row: int, text: Tensor, length: float) -> Tensor:
        noise = draws.normal([row], what, step, text.shape)[0]
        return (length * text.float().norm() / noise.norm() * noise).to(text.dtype)

    def one(row: int, text: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor | None]:
        attempt = 0
        while True:
            what = f"anchor {number}, attempt {attempt}"
            u = draws.uniform([row], f"{what}, length and luck", step, [2])[0].tolist()
            length = 0.8 + 0.4 * u[0]
            found = near(what, row, text, length)
            if u[1] < 1 - float(torch.cosine_similarity(found.flatten(), text.flatten(), dim=0)):
                return found, None if pooled is None else near(f"{what}, pooled", row, pooled, length)
            attempt += 1

    pools = [None] * len(concepts) if concepts.pooled is None else list(concepts.pooled)
    texts, pooled = zip(*map(one, rows, concepts.embeds, pools), strict=True)
    return PromptEmbeds(
        torch.stack(texts), None if concepts.pooled is None else torch.stack(pooled), concepts.tokens
    )


def _to(device: torch.device, texts: PromptEmbeds) -> PromptEmbeds:
    pooled = None if texts.pooled is None else texts.pooled.to(device)
    return replace(texts, embeds=texts.embeds.to(device), pooled=pooled)


def _layers(model: DiffusionModel) -> list[str]:
    """The weights of linears and convolutions in transformer blocks."""
    found = [
        f"{name}.weight"
        for name, module in model.eager_unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and _ATTENTION.search(name)
    ]
    if not found:
        raise ValueError("pipe: got a denoiser without attention, expected one that reads prompts by it")
    return found


def _schedule(learning_rate: float, steps: int) -> Any:
    """From a step to its rate: a linear start, then falls of a cosine."""
    warmup = int(steps * _WARMUP)

    def rate(step: int) -> float:
        if step < warmup:
            return learning_rate * (step + 1) / warmup
        part = (step - warmup) / max(1, steps - warmup) * _RESTARTS % 1
        return learning_rate * 0.5 * (1 + math.cos(math.pi * part))

    return rate
