"""Textual Inversion (Gal et al., ICLR 2023): a new word whose embedding stands for a subject."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pumice import models
from pumice.models.arguments import check_prompt, check_scale, checked_count, first_seed
from pumice.models.draws import Draws
from pumice.training.checkpoint import Checkpoint
from pumice.training.examples import Examples, Row, denoising
from pumice.training.pictures import digest
from pumice.training.steps import train
from pumice.training.templates import TEMPLATES

from .new_tokens import NewTokens
from .pictures import of_step, of_subject
from .result import Personalized


@torch.inference_mode(False)  # a caller's inference mode would leave nothing to differentiate
def textual_inversion(
    pipe: Any,
    images: Any,
    placeholder_token: str,
    initializer_token: str,
    *,
    num_vectors: int = 1,
    templates: Sequence[str] = TEMPLATES,
    steps: int = 3000,
    learning_rate: float = 5e-4,
    batch_size: int = 1,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: int = 100,
    seed: int = 0,
    rows: int = 16,
    progress: bool = False,
) -> Personalized:
    """Personalize a model by a new word: Textual Inversion.

    ::

        v* = argmin_v  E |network(z_t, t, c(template, v)) - target|^2

    a mean over pixels and the batch, by AdamW on v, the (num_vectors, d) embeddings of the new word, alone
    (Gal et al., arXiv:2208.01618); a model with two text encoders has v of both. All other weights, those of
    the embedding matrix included, are the pipeline's own and cannot move. Prompts name the word as
    "a photo of <creature>" does; noise cannot be put down to a phrase here, as no other word learns.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        images: of the subject: (N, 3, H, W) in [0, 1], PIL images or paths.
        placeholder_token: the new word, lower-case, such as "<creature>".
        initializer_token: a word of one token that v starts from, such as "creature".
        num_vectors: tokens that the word stands for. Default 1, of the paper.
        templates: prompts with "{}" in the word's place, one at random for each picture and step. Default the
            paper's 27 neutral ones.
        steps: default 3000, as of diffusers' example.
        learning_rate: default 5e-4, of the same. It is not multiplied by the batch size.
        batch_size: pictures in a step. Default 1, of the same.
        checkpoint: a folder to write the state to, and to go on from: an interrupted call, repeated, gives
            the same result.
        checkpoint_every: steps.
        seed: of all random numbers.
        rows: of a pass; halved on out-of-memory. Default 16.
        progress: show a bar.

    Returns:
        A `Personalized`; `save` writes `learned_embeds.safetensors`, for `load_textual_inversion`, and for a
        second text encoder `learned_embeds_2.safetensors`.

    Several processes (`accelerate launch`, `torchrun`) share the rows of each step; the result is that of
    one. Only the main one writes checkpoints, so all need the same folder.

    Differences from the paper: it trains a latent diffusion model by 5000 steps at 5e-3.

    Warns:
        PersonalizationWarning: if there is one picture only.
        TrainingWarning: if there is no room to keep a checkpoint.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind; if the new word is
            known already or the other one is not one token; if the word does not fit into a prompt; if a
            checkpoint is of another training or cannot be read; and if a loss is not finite.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    words = {"placeholder_token": placeholder_token, "initializer_token": initializer_token}
    for name, word in words.items():
        check_prompt(name, word)
        if not word or word.split() != [word]:
            raise ValueError(f"{name}: got {word!r}, expected a word without spaces")
    templates = _checked_templates(templates)
    num_vectors, steps = checked_count("num_vectors", num_vectors), checked_count("steps", steps)
    batch_size, rows = checked_count("batch_size", batch_size), checked_count("rows", rows)
    checkpoint_every = checked_count("checkpoint_every", checkpoint_every)
    check_scale("learning_rate", learning_rate, positive=True)
    learning_rate = float(learning_rate)
    seed = first_seed(seed)
    source = models.load(pipe)
    student = NewTokens(source, placeholder_token, initializer_token, num_vectors)
    prompts = [template.replace("{}", placeholder_token) for template in templates]
    student.check_room(prompts)
    pictures = of_subject(images, source)
    settings = {
        "method": "textual_inversion",
        "model": models.fingerprint(source),
        "images": digest(pictures),
        "placeholder_token": placeholder_token,
        "initializer_token": initializer_token,
        "num_vectors": num_vectors,
        "templates": templates,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
    }
    kept = None if checkpoint is None else Checkpoint(checkpoint, settings)
    examples = Examples(source, pictures, placeholder_token)
    with models.frozen(student.model.unet, data_gradient=True):
        losses = train(
            student,
            denoising(student, partial(_rows, examples, prompts, batch_size), batch_size, seed),
            steps,
            learning_rate=learning_rate,
            count=batch_size,
            batch=rows,
            checkpoint=kept,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
    student.settle()
    result = student.model.pipe
    result.scheduler = copy.deepcopy(result.scheduler)
    return Personalized(result, losses, settings, None, partial(_write, student))


def _rows(examples: Examples, prompts: Sequence[str], batch_size: int, step: int, draws: Draws) -> list[Row]:
    """What a step learns: pictures in turn, each under a template of its own."""
    which = draws.integers(range(batch_size), "template", step, len(prompts)).tolist()
    return [
        Row(number, examples.latents(item, draws, number, step), prompts[template], 1 / batch_size)
        for number, (item, template) in enumerate(
            zip(of_step(draws, step, batch_size, len(examples)), which, strict=True)
        )
    ]


def _checked_templates(templates: Sequence[str]) -> list[str]:
    if isinstance(templates, str) or not all(isinstance(template, str) for template in templates):
        raise TypeError(f"templates: got {templates!r}, expected a list of strings")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"templates: got {template!r}, expected one {{}} in it")
    if not templates:
        raise ValueError("templates: got an empty list, expected at least one")
    return list(templates)


def _write(student: NewTokens, folder: Path) -> None:
    for number, embedding in enumerate(student.embeddings(), start=1):
        name = "learned_embeds.safetensors" if number == 1 else f"learned_embeds_{number}.safetensors"
        save_file({student.word: embedding.cpu().contiguous()}, folder / name, {"format": "pt"})
