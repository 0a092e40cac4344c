"""How soon an edited model draws an erased concept again when it is fine-tuned on a few pictures of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice.evaluate.attacks.attack import (
    Attack,
    Judge,
    batch_of,
    checked_budgets,
    checked_scale,
    checked_seed,
    checked_seeds,
    named,
    rate,
)
from pumice.evaluate.drawing import edited
from pumice.evaluate.erasure import Classify
from pumice.models import DiffusionModel, Edit
from pumice.models.arguments import check_prompt, checked_count
from pumice.models.draws import Draws
from pumice.training.examples import Examples, Row, denoising
from pumice.training.steps import train
from pumice.training.student import Mode, Student


@torch.inference_mode(False)
def relearning(
    pipe: Any,
    edits: Edit | Mapping[str, Edit],
    images: Any,
    prompt: str,
    *,
    label: str,
    classify: Classify,
    k: int = 1,
    steps: int = 100,
    checkpoints: Sequence[int] = (0,),
    learning_rate: float = 1e-5,
    batch_size: int = 4,
    mode: Mode = "fp32_master",
    rank: int = 4,
    seeds: int | Sequence[int] = 10,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    rows: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Attack:
    """Fine-tune each edited model on a few pictures of what was erased, and count how often it draws it.

    ::

        mean over rows of |prediction(z_t, t, prompt) - target(z, noise, t)|^2

    by AdamW on the denoiser. An edit that leaves the concept in the weights gives it back in fewer steps than
    a model needs that never knew it; how many those are, pictures of a thing that the model never saw can
    tell. "none" is the model as it is, fine-tuned alike.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        edits: by name ("none" is added), or one, named after its method.
        images: of the concept, about six, as `concept_inversion` takes them.
        prompt: that they are learned under, and that is drawn.
        label, classify, k: as of `concept_inversion`.
        steps: of AdamW. Default 100.
        checkpoints: smaller numbers of steps at which success is measured, too. Default 0, the edit as it is.
        learning_rate: default 1e-5.
        batch_size: rows of a step, pictures drawn at random. Default 4.
        mode: what trains, as of `pumice.training.student.Student`: "fp32_master", the whole denoiser, by
            default; "bf16_faithful"; "lora".
        rank: of "lora".
        seeds: how many pictures are drawn (0, 1, 2, ...), or which.
        num_inference_steps: of the pipeline's own scheduler, to draw. Default 50.
        guidance_scale: to draw. Default 7.5.
        rows: samples in one call of the denoiser; halved on out-of-memory.
        seed: of which pictures, noises and timesteps.
        progress: show a bar.

    Returns:
        An `Attack`; its losses are (1, steps), its pictures (S, 3, H, W) those of the end. The defaults are
        no paper's.

    Raises:
        TypeError, ValueError: naming the argument; for an edit that was made for a model with other weights,
            if what `classify` returns does not fit, and if a loss is not finite.
        UnsupportedModelError: if the model's family is not supported, or its weights cannot train.
    """
    every, drawn, seed = named(edits), checked_seeds(seeds), checked_seed(seed)
    check_prompt("prompt", prompt)
    steps, batch_size = checked_count("steps", steps), checked_count("batch_size", batch_size)
    rank, most = checked_count("rank", rank), checked_count("rows", rows)
    learning_rate = checked_scale("learning_rate", learning_rate, positive=True)
    budgets = checked_budgets(checkpoints, steps)
    model = models.load(pipe)
    model.check_text_to_image()
    pictures = batch_of(images, model)
    height, width = pictures.shape[2:]
    judge = Judge(model, label, classify, k, num_inference_steps, guidance_scale, height=height, width=width)
    found: list[dict[str, Any]] = []
    losses: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for name, edit in tqdm(every.items(), unit="edit", desc="relearning", disable=not progress):
        with model.frozen(), edited(model, [edit]):
            # it reads the text encoders and the autoencoder of the edited model
            student = Student(model, mode, train_text_encoder=False, rank=rank, seed=seed)
            examples = Examples(model, [*pictures], prompt)

            def see(step: int, name: str = name, copied: DiffusionModel = student.model) -> None:
                if step + 1 in budgets:
                    last[name] = judge.of(copied).draw_all([prompt] * len(drawn), drawn, most)
                    found.append({"name": name, "steps": step + 1, **rate(judge.hits(last[name]))})

            def of_step(step: int, draws: Draws, examples: Examples = examples) -> list[Row]:
                which = draws.integers(range(batch_size), "picture", step, len(examples)).tolist()
                return [
                    Row(row, examples.latents(index, draws, row, step), prompt, 1 / batch_size)
                    for row, index in enumerate(which)
                ]

            see(-1)
            losses[name] = train(
                student,
                denoising(student, of_step, batch_size, seed),
                steps,
                learning_rate=learning_rate,
                count=batch_size,
                batch=most,
                after=see,
            )[None]
    return Attack(
        attack="relearning",
        label=label,
        rows=tuple(found),
        losses=losses,
        pictures=last,
        settings={
            "model": repr(model),
            "scheduler": type(model.pipe.scheduler).__name__,
            "images": len(pictures),
            "prompt": prompt,
            "k": judge.k,
            "steps": steps,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "mode": mode,
            "rank": rank,
            "seeds": list(drawn),
            **judge.settings,
            "seed": seed,
        },
    )
