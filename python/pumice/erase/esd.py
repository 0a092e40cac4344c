"""ESD: the model learns to be guided away from a concept (Gandikota et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Unpack, get_args

import torch
from torch import Tensor

from pumice import models
from pumice.erase.arguments import check_scale, checked_texts
from pumice.erase.trainer import Trainer, TrajectoryOptions, apart, noises
from pumice.models import DiffusionModel, Edit, PromptEmbeds

TrainMethod = Literal["esd-x", "esd-u", "esd-all", "esd-x-strict"]
Target = Literal["paper", "diffusers"]

SETS: dict[TrainMethod, str] = {
    "esd-x": "xattn",
    "esd-u": "noxattn",
    "esd-all": "full",
    "esd-x-strict": "xattn-kv",
}
"""What trains, by the names of the released code."""


@torch.inference_mode(False)
def esd(
    pipe: Any,
    concepts: str | Sequence[str],
    *,
    erase_from: str | None = None,
    train_method: TrainMethod = "esd-x",
    target: Target = "paper",
    negative_guidance: float | None = None,
    start_guidance: float | None = None,
    num_inference_steps: int = 50,
    sample_from: Literal["edited", "original"] | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    **options: Unpack[TrajectoryOptions],
) -> Edit:
    """Erase concepts by teaching the model what it would predict if it were guided away from them.

    ::

        |epsilon'(z_t, t, c) - [epsilon(z_t, t, "") - eta (epsilon(z_t, t, c) - epsilon(z_t, t, ""))]|^2

    a mean over elements; epsilon' trains, epsilon is the model as it was (Gandikota et al.,
    arXiv:2303.07345). z_t lies on a guided trajectory of c. Several concepts take turns at random.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them.
        erase_from: "erase c from this": it is what trajectories draw and the trained model reads, and the
            target is  epsilon(erase_from) - eta (epsilon(c) - epsilon("")); with target "diffusers" only.
        train_method: "esd-x" trains cross-attention, for styles; "esd-u" everything else but output and
            time, for nudity and objects; "esd-all"; "esd-x-strict" keys and values alone.
        target: "paper", as above, or "diffusers" for  epsilon(c) - eta (epsilon(c) - epsilon(""))  of the
            authors' later code: that of the paper with an eta of one less.
        negative_guidance: eta. Default 1, of the paper.
        start_guidance: s_g, of trajectories. Default 3, of the paper.
        num_inference_steps: of a whole trajectory. Default 50, of the paper.
        sample_from: which model draws trajectories. Default "edited", of the paper; with target "diffusers"
            "original", of that code.
        steps: default 1000, of the paper.
        learning_rate: Adam's. Default 1e-5, of the paper.
        options: `pumice.erase.trainer.TrajectoryOptions`.

    With target "diffusers" defaults are those of that code, which has others for Stable Diffusion XL::

                               negative_guidance   start_guidance   steps   learning_rate
        Stable Diffusion       2                   3                200     5e-5
        Stable Diffusion XL    1                   2                200     2e-4, with "esd-u" 1e-5

    Returns:
        An `Edit`: weights that are added, or with `rank` a LoRA.

    Differences from the released code: everything else is the model's own, not a second model; weights that
    train are float32 whatever the pipeline's dtype; latents have the model's own size (the later code draws
    at 1024 px even for Stable Diffusion 1).

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, and if a loss
            or gradient is not finite, whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    if train_method not in SETS:
        raise ValueError(f"train_method: got {train_method!r}, expected one of {', '.join(SETS)}")
    if target not in get_args(Target):
        raise ValueError(f"target: got {target!r}, expected 'paper' or 'diffusers'")
    later = target == "diffusers"
    if erase_from is not None:
        checked_texts("erase_from", [erase_from])
        if not later:
            raise ValueError("erase_from: got one, expected target='diffusers' with it")
    if sample_from not in (None, "edited", "original"):
        raise ValueError(f"sample_from: got {sample_from!r}, expected 'edited' or 'original'")
    sample_from = sample_from or ("original" if later else "edited")
    source = models.load(pipe)
    default = _defaults(source, train_method) if later else _Defaults(1.0, 3.0, 1000, 1e-5)
    eta = default.eta if negative_guidance is None else negative_guidance
    eta = check_scale("negative_guidance", eta)
    start_guidance = default.start_guidance if start_guidance is None else start_guidance
    start_guidance = check_scale("start_guidance", start_guidance)
    trainer = Trainer(
        source,
        concepts,
        SETS[train_method],
        method="esd",
        settings={
            "erase_from": erase_from,
            "train_method": train_method,
            "target": target,
            "negative_guidance": eta,
            "start_guidance": start_guidance,
            "num_inference_steps": num_inference_steps,
            "sample_from": sample_from,
        },
        steps=default.steps if steps is None else steps,
        learning_rate=default.learning_rate if learning_rate is None else learning_rate,
        **options,
    )
    model, student = trainer.model, trainer.student

    def drawn(step: int) -> PromptEmbeds:
        return trainer.encode([erase_from or concept for concept in trainer.of_step(step)])

    trajectories = trainer.trajectories(
        drawn,
        guidance_scale=start_guidance,
        num_inference_steps=num_inference_steps,
        model=student if sample_from == "edited" else model,
    )

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        z, t = trajectories.at(step).of(rows)
        read = drawn(step)[rows]
        concept = trainer.encode(trainer.of_step(step))[rows]
        away, towards, start = noises(model, z, t, trainer.encode([""]), concept, read)
        goal = (start if later else away) - eta * (towards - away)
        return apart(student.predict_noise(z, t, read), goal, trainer.count)

    return trainer.train(loss)


class _Defaults(NamedTuple):
    eta: float
    start_guidance: float
    steps: int
    learning_rate: float


def _defaults(model: DiffusionModel, train_method: TrainMethod) -> _Defaults:
    """Those of the authors' later code."""
    if model.family != "stable_diffusion_xl":
        return _Defaults(2.0, 3.0, 200, 5e-5)
    return _Defaults(1.0, 2.0, 200, 1e-5 if train_method == "esd-u" else 2e-4)
