"""SDD: what a model predicts of a concept becomes what it predicts of nothing (Kim et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from pumice.erase.arguments import check_scale, warn
from pumice.erase.parameters import parameters as names_of
from pumice.erase.trainer import Trainer, TrajectoryOptions, apart, noises
from pumice.models import Edit, PromptEmbeds
from pumice.training.student import Part

_WEIGHT_DECAY, _MAX_GRAD_NORM = 1e-4, 1.0


@torch.inference_mode(False)
def sdd(
    pipe: Any,
    concepts: str | Sequence[str],
    *,
    start_guidance: float = 3.0,
    num_inference_steps: int = 50,
    ema_decay: float = 0.999,
    parameters: str = "xattn",
    steps: int = 1500,
    learning_rate: float = 1e-5,
    **options: Unpack[TrajectoryOptions],
) -> Edit:
    """Erase concepts by teaching the model to predict of them what it itself predicts of the empty prompt.

    ::

        |sg[epsilon'(z_t, t, "")] - epsilon'(z_t, t, c)|^2         W* <- m W* + (1 - m) W'

    a mean over elements; epsilon' trains, sg stops the gradient (Kim et al., arXiv:2307.05977). z_t lies on a
    trajectory that the mean W* of the weights so far draws of all concepts together, joined by ", "; the
    concepts c take turns at random. The result is W*.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them.
        start_guidance: of trajectories. Default 3, of the paper.
        num_inference_steps: of a whole trajectory. Default 50, of the paper.
        ema_decay: m. Default 0.999, of the paper; fewer than some 1 / (1 - m) steps leave W* near W.
        parameters: a set of weights, one of `pumice.erase.parameters.SETS`. Default cross-attention, of the
            paper.
        steps: default 1500, of the paper.
        learning_rate: AdamW's, with weight decay 1e-4 and gradients clipped to a norm of 1. Default 1e-5, of
            the paper.
        options: `pumice.erase.trainer.TrajectoryOptions`.

    Returns:
        An `Edit`: weights that are added, or with `rank` a LoRA. Its two matrices are means, each of its own,
        so that it stays of that rank; their product is not the mean of products, which would not.

    Differences from the released code: its 'sequential' turns always take the first concept; a trajectory to
    be left at once is walked to its end there; the mean is of the weights that train, not of all.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, and if a loss
            or gradient is not finite, whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    start_guidance = check_scale("start_guidance", start_guidance)
    ema_decay = check_scale("ema_decay", ema_decay)
    if ema_decay >= 1:
        raise ValueError(f"ema_decay: got {ema_decay}, expected one below 1")
    trainer = Trainer(
        pipe,
        concepts,
        parameters,
        method="sdd",
        settings={
            "start_guidance": start_guidance,
            "num_inference_steps": num_inference_steps,
            "ema_decay": ema_decay,
        },
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )
    student, rank = trainer.student, trainer.part.rank
    mean = Part(trainer.model, names_of(trainer.model, parameters, rank=rank), rank=rank)
    mean.restore(trainer.part.masters)
    together = ", ".join(trainer.concepts)
    if dropped := trainer.encode([together]).truncated[0]:
        warn(f"concepts: no latents are drawn of {dropped!r}, which does not fit into a prompt with the rest")

    def drawn(step: int) -> PromptEmbeds:
        return trainer.encode([together] * trainer.count)

    trajectories = trainer.trajectories(
        drawn, guidance_scale=start_guidance, num_inference_steps=num_inference_steps, model=mean.model
    )

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        z, t = trajectories.at(step).of(rows)
        concept = trainer.encode(trainer.of_step(step))[rows]
        (goal,) = noises(student, z, t, trainer.encode([""]))
        return apart(student.predict_noise(z, t, concept), goal, trainer.count)

    @torch.no_grad()
    def average(step: int) -> None:
        torch._foreach_lerp_(mean.masters, trainer.part.masters, 1 - ema_decay)

    return trainer.train(
        loss,
        prepare=lambda step: mean.publish(),
        after=average,
        kept={f"mean.{name}": value for name, value in zip(mean.weights, mean.masters, strict=True)},
        values=lambda: mean.masters,
        shown=mean.model,
        weight_decay=_WEIGHT_DECAY,
        max_grad_norm=_MAX_GRAD_NORM,
    )
