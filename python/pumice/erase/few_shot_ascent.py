"""Unlearning in the text encoder by gradient ascent, from few pictures or none (arXiv:2405.07288)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from pumice import models
from pumice.erase.arguments import checked_templates, checked_texts
from pumice.erase.few_pictures import (
    Noised,
    digests,
    given_pictures,
    named,
    noised,
    of_pictures,
    picked,
    text_layers,
)
from pumice.erase.trainer import Options, Trainer, apart
from pumice.models import DiffusionModel, Edit
from pumice.models.draws import Draws
from pumice.training.templates import PHRASES


@torch.inference_mode(False)
def few_shot_ascent(
    pipe: Any,
    concepts: str | Sequence[str],
    images: Any = None,
    *,
    latents: Literal["gaussian", "uniform"] = "gaussian",
    templates: Sequence[str] = PHRASES,
    steps: int = 8,
    learning_rate: float = 1e-5,
    **options: Unpack[Options],
) -> Edit:
    """Make the text encoder worse at a few pictures of concepts: gradient ascent on the diffusion loss.

    ::

        L = -|epsilon'(z_t, t, c) - noise|^2

    a mean over elements, by Adam with betas (0.9, 0.98), eps 1e-6 and weight decay 1e-8 on the text encoder's
    MLPs and its last self-attention (Fuchi and Takagi, arXiv:2405.07288). There is nothing that it converges
    to: steps and learning rate alone say how much is lost, of the concept and of all else.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them.
        images: of the concept, (N, 3, H, W) in [0, 1], PIL images or paths, or a list of such, one for each
            of several; the paper takes 4. Without them the variant without pictures: z is random, anew in
            each row.
        latents: of that variant, standard normal, or "uniform" in [0, 1) as in the released code.
        templates: with {} for the concept; one at random for each row.
        steps: default 8, of the paper: 4 epochs of 4 pictures, two at a time.
        learning_rate: default 1e-5, of the paper.
        options: `pumice.erase.trainer.Options`; batch_size is 2 by default, of the paper.

    Returns:
        An `Edit` of the text encoder: it serves every denoiser that has the same one.

    Differences from the paper: templates are few, for concepts that come with their article;
    weight decay is AdamW's; with Stable Diffusion XL, layers are those of both encoders that the denoiser
    reads, which end before the last.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, and if a loss
            or gradient is not finite, whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights, and for text encoders of
            another kind than CLIP's.
    """
    concepts = checked_texts("concepts", concepts)
    templates = checked_templates("templates", templates, least=1)
    if latents not in ("gaussian", "uniform"):
        raise ValueError(f"latents: got {latents!r}, expected 'gaussian' or 'uniform'")
    options.setdefault("batch_size", 2)
    model = models.load(pipe)
    pictures = given_pictures(images, concepts, model)
    trainer = Trainer(
        model,
        concepts,
        [*_mlps(model, whole=options.get("rank") is None)],
        method="few_shot_ascent",
        settings={"images": digests(pictures), "latents": latents, "templates": list(templates)},
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )
    student, draws = trainer.student, trainer.draws
    if pictures is None:
        examples = _of_nothing(model, draws, draws.normal if latents == "gaussian" else draws.uniform)
    else:
        examples = of_pictures(model, pictures, draws, trainer.count)

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        of = [trainer.of_step(step)[row] for row in rows]
        z, t, noise = examples(step, rows, of)
        embeds = student.encode_prompt(named(picked(templates, draws, rows, "template", step), of))
        return -apart(student.predict_noise(z, t, embeds), noise, trainer.count)

    with models.frozen(student.unet, data_gradient=True):
        return trainer.train(loss, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-8)


def _of_nothing(model: DiffusionModel, draws: Draws, random: Callable[..., Tensor]) -> Noised:
    """z_t, t and the noise of a step's rows: random latents."""

    def of_rows(step: int, rows: Sequence[int], of: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        return noised(model, random(rows, "latents", step, model.latent_shape()), draws, step, rows)

    return of_rows


def _mlps(model: DiffusionModel, *, whole: bool) -> Iterator[str]:
    """The weights, and the biases if they train whole, of all MLPs and the last self-attention."""
    for name, encoder, layers, _ in text_layers(model):
        parts = (*(f"{layer}.mlp." for layer in layers), f"{layers[-1]}.self_attn.")
        for path, weight in encoder.named_parameters():
            if path.startswith(parts) and (whole or weight.ndim > 1):
                yield f"{name}.{path}"
