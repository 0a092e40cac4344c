"""Forget-Me-Not: pictures of a concept no longer look at the words for it (Zhang et al., CVPRW 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from pumice import models
from pumice.erase.arguments import check_scale, checked_texts
from pumice.erase.attention_loss import Subjects, root
from pumice.erase.trainer import Options, Trainer
from pumice.models import Edit
from pumice.models.arguments import first_seed


@torch.inference_mode(False)
def forget_me_not(
    pipe: Any,
    concepts: str | Sequence[str],
    images: Any = None,
    *,
    prompt: str = "a photo of {}",
    with_eos: bool = False,
    parameters: str = "full",
    num_images: int = 8,
    steps: int = 35,
    learning_rate: float = 2e-6,
    weight_decay: float = 0.01,
    **options: Unpack[Options],
) -> Edit:
    """Erase concepts by taking the attention of their pictures away from their words.

    ::

        |cat_l A_l[:, :, S]|_F        A_l = softmax(q k^T / sqrt(d)) of cross-attention layer l, all its heads

    of pictures of the concept, noised to a uniform t, under the prompt in which its tokens stand at S (Zhang
    et al., arXiv:2303.17591, attention resteering): one norm over all layers, heads and positions, neither
    squared nor averaged, so that the gradient has the same size wherever training stands.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them; several take turns at random.
        images: of the concept, (N, 3, H, W) in [0, 1], PIL images or paths, or a list of such, one for each
            of several. By default the model draws them from the prompt.
        prompt: a template with one "{}" for the concept.
        with_eos: whether EOS is in S. Default False.
        parameters: a set of weights, one of `pumice.erase.parameters.SETS`. Default all: the released code
            has these and "xattn".
        num_images: how many of each concept are drawn. Default 8, an assumption: the paper has "a few".
        steps: default 35, of the released code.
        learning_rate: AdamW's. Default 2e-6, of the released code.
        weight_decay: default 0.01, of the released code.
        options: `pumice.erase.trainer.Options`. A checkpoint has the pictures that the model drew, too.

    Returns:
        An `Edit`: weights that are added, or with `rank` a LoRA.

    Differences from the released code: concepts go by their names, not by four tokens that textual inversion
    learns first; with a `batch_size` each picture has a norm of its own, and the loss is their mean; maps of
    attention are not kept (`pumice.ops.attention_columns`), and the model attends by its own processors.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, and if a loss
            or gradient is not finite, whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    concepts = checked_texts("concepts", concepts)
    check_scale("weight_decay", weight_decay)
    model = models.load(pipe)
    model.check_editable()  # that q and k are there to be read
    subjects = Subjects(
        model, concepts, images, None, prompt=prompt, with_eos=with_eos, num_images=num_images
    )
    trainer = Trainer(
        model,
        concepts,
        parameters,
        method="forget_me_not",
        settings={**subjects.settings, "weight_decay": float(weight_decay)},
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )
    subjects.draw(first_seed(options.get("seed", 0)), options)

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        t = trainer.draws.integers(rows, "timestep", step, model.schedule.num_train_timesteps)
        return root(subjects.energies(trainer, step, rows, t).sum(1)).sum() / trainer.count

    return trainer.train(loss, weight_decay=weight_decay)
