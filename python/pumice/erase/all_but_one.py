"""All but One: the guidance of one concept changes, and what is predicted without a prompt stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from pumice.erase.arguments import check_scale, checked_guides, checked_texts
from pumice.erase.trainer import Trainer, TrajectoryOptions, apart, noises
from pumice.models import Edit, PromptEmbeds


@torch.inference_mode(False)
def all_but_one(
    pipe: Any,
    concepts: str | Sequence[str],
    *,
    alternative: str | Sequence[str] = "",
    preserve_scale: float = 1.0,
    start_guidance: float = 3.0,
    num_inference_steps: int = 50,
    parameters: str = "xattn",
    steps: int = 1000,
    learning_rate: float = 1e-5,
    **options: Unpack[TrajectoryOptions],
) -> Edit:
    """Erase concepts by making their guidance that of an alternative, or none.

    ::

        |d'(z_t, t, c) - d(z_t, t, a)|^2 + beta |epsilon'(z_t, t, "") - epsilon(z_t, t, "")|^2

        d(z, t, c) = epsilon(z, t, c) - epsilon(z, t, "")

    means over elements; d', epsilon' train, d, epsilon are of the model as it was (Hong et al.,
    arXiv:2312.12807). The second term keeps what the model predicts without a prompt, of layouts.

    Assumed, as the paper's own equation and settings could not be checked, and no code was released: the
    formula above, beta = 1, that cross-attention trains, and everything of the training as ESD has it: z_t on
    a trajectory of c that the trained model draws with guidance 3, 1000 steps of Adam at 1e-5.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: c, as the model's captions word them; several take turns at random.
        alternative: a, one for all concepts or one for each. Default "", no guidance.
        preserve_scale: beta.
        start_guidance: of trajectories.
        num_inference_steps: of a whole trajectory.
        parameters: a set of weights, one of `pumice.erase.parameters.SETS`. Default cross-attention.
        steps, learning_rate: Adam's.
        options: `pumice.erase.trainer.TrajectoryOptions`.

    Returns:
        An `Edit`: weights that are added, or with `rank` a LoRA.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, and if a loss
            or gradient is not finite, whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    concepts = checked_texts("concepts", concepts)
    guides = checked_guides(alternative, concepts, "alternative")
    preserve_scale = check_scale("preserve_scale", preserve_scale)
    start_guidance = check_scale("start_guidance", start_guidance)
    trainer = Trainer(
        pipe,
        concepts,
        parameters,
        method="all_but_one",
        settings={
            "alternative": list(guides),
            "preserve_scale": preserve_scale,
            "start_guidance": start_guidance,
            "num_inference_steps": num_inference_steps,
        },
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )
    student, of = trainer.student, dict(zip(concepts, guides, strict=True))

    def drawn(step: int) -> PromptEmbeds:
        return trainer.encode(trainer.of_step(step))

    trajectories = trainer.trajectories(
        drawn, guidance_scale=start_guidance, num_inference_steps=num_inference_steps
    )

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        z, t = trajectories.at(step).of(rows)
        concept, plain = drawn(step)[rows], trainer.encode([""] * len(rows))
        instead = trainer.encode([of[text] for text in trainer.of_step(step)])[rows]
        away, other = noises(trainer.model, z, t, plain, instead)
        both = PromptEmbeds.cat((plain, concept))
        free, guided = student.predict_noise(z.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        drift = apart(free, away, trainer.count)
        return apart(guided - free, other - away, trainer.count) + preserve_scale * drift

    return trainer.train(loss)
