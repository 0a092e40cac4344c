"""DreamBooth (Ruiz et al., CVPR 2023): a model learns a subject from a few pictures; with a noise phrase,
contrastive decoupling."""

from __future__ import annotations

import copy
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice import models
from pumice.models import DiffusionModel
from pumice.models.arguments import check_scale, checked_count, first_seed
from pumice.models.draws import Draws
from pumice.training.checkpoint import Checkpoint
from pumice.training.class_pictures import drawn_pictures
from pumice.training.examples import Examples, Row, denoising
from pumice.training.pictures import digest, learnable
from pumice.training.processes import processes
from pumice.training.steps import train
from pumice.training.student import LEARNING_RATES, Mode, Student, check_moves, trainable_parts

from .arguments import warn
from .decoupling import check_prompts, with_noise, without_noise
from .pictures import of_step, of_subject
from .result import Personalized


@torch.inference_mode(False)  # a caller's inference mode would leave nothing to differentiate
def dreambooth(
    pipe: Any,
    images: Any,
    prompt: str,
    class_prompt: str | None = None,
    *,
    noise_phrase: str | None = None,
    mode: Mode = "fp32_master",
    steps: int = 1000,
    learning_rate: float | None = None,
    batch_size: int = 1,
    prior_weight: float = 1.0,
    class_images: Any = None,
    num_class_images: int = 200,
    train_text_encoder: bool = True,
    rank: int = 4,
    max_grad_norm: float = 1.0,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: int = 100,
    seed: int = 0,
    rows: int = 16,
    recompute: bool = False,
    progress: bool = False,
) -> Personalized:
    """Personalize a model: DreamBooth with prior preservation, and contrastive decoupling.

    ::

        L = |network(z_t, t, c) - target|^2 + prior_weight |network(z'_t', t', c') - target'|^2

    a mean over pixels and the batch, by AdamW (Ruiz et al., arXiv:2208.12242); z is a picture of the subject,
    z' one of its class, which keeps the model from forgetting what others of the class look like. Latents'
    posteriors are computed once, and sampled anew in each step.

    With `noise_phrase` V the subject is learned under "prompt, V" and the class under "class_prompt, without
    V" (contrastive decoupling, arXiv:2406.18944, in the wording of its code): the noise of protected pictures
    then becomes the meaning of V. Draw by `personalize.sample`, which says "without V".

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        images: of the subject: (N, 3, H, W) in [0, 1], PIL images or paths.
        prompt: what they are called, with a rare word, such as "a photo of sks person".
        class_prompt: what the subject is one of, such as "a photo of person"; None does without class.
        noise_phrase: V, such as `personalize.NOISE_PHRASE`; needs a class, which "without V" is learned from.
        mode: "fp32_master" trains all weights in float32 while the networks compute in the pipeline's dtype;
            "lora" matrices of low rank at attention projections; "bf16_faithful" all weights in bfloat16, as
            some released code does it, where small updates round away.
        steps: default 1000, as of Anti-DreamBooth's and the decoupling paper's code.
        learning_rate: default 5e-7, of the same; with "lora" 5e-4, of the same.
        batch_size: pictures of the subject in a step, and as many of the class. Default 1, of the same.
        prior_weight: default 1, of the paper.
        class_images: pictures of the class; by default the model draws them first, by 50 steps of DDIM with
            guidance 7.5, in 8 bits as in the files of the code.
        num_class_images: how many it draws, no more than training reaches. Default 200, of the same code.
        train_text_encoder: the text encoder learns, too. Default True, of the same.
        rank: of "lora". Default 4, of the same.
        max_grad_norm: gradients are clipped to. Default 1, of the same.
        checkpoint: a folder to write the state and drawn class pictures to, and to go on from: an
            interrupted call, repeated, gives the same result.
        checkpoint_every: steps.
        seed: of all random numbers.
        rows: of a pass, pictures of subject and class; halved on out-of-memory. Default 16.
        recompute: keep less of the denoiser's forward pass in memory, and compute it again (gradient
            checkpointing); the decoupling paper's code does. Default False.
        progress: show a bar.

    Returns:
        A `Personalized`.

    Several processes (`accelerate launch`, `torchrun`) share the class pictures to draw and the rows of each
    step; the result is that of one. Only the main one writes checkpoints, so all need the same folder.

    Differences from the code: pictures come in the order of a random permutation that is the same for any
    number of processes, and AdamW is not of 8 bits.

    Warns:
        PersonalizationWarning: if there is one picture only, and if class pictures have to be drawn.
        TrainingWarning: if there is no room to keep a checkpoint.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind; if the prompts do
            not name a subject, or the noise phrase has the subject's name or no class; if the learning rate
            is so small that the weights, in the pipeline's dtype, would not move; if a checkpoint is of
            another training or version, or cannot be read; and if a loss or gradient is not finite,
            whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    check_prompts(prompt, class_prompt, noise_phrase)
    steps, batch_size = checked_count("steps", steps), checked_count("batch_size", batch_size)
    for name, value in {"prior_weight": prior_weight, "max_grad_norm": max_grad_norm}.items():
        check_scale(name, value, positive=name == "max_grad_norm")
    prior_weight, max_grad_norm = float(prior_weight), float(max_grad_norm)
    if noise_phrase is not None and prior_weight == 0:
        raise ValueError(
            "prior_weight: got 0, expected more with a noise_phrase, which the class goes without"
        )
    num_class_images, rank = checked_count("num_class_images", num_class_images), checked_count("rank", rank)
    checkpoint_every, rows = checked_count("checkpoint_every", checkpoint_every), checked_count("rows", rows)
    seed = first_seed(seed)
    source = models.load(pipe)
    parts = trainable_parts(source, mode, train_text_encoder=train_text_encoder)
    learning_rate = LEARNING_RATES[mode] if learning_rate is None else learning_rate
    check_scale("learning_rate", learning_rate, positive=True)
    learning_rate = float(learning_rate)
    if mode == "fp32_master":
        check_moves(
            [weight for part in parts.values() for weight in part.parameters()],
            learning_rate,
            steps,
            "mode='bf16_faithful', which is known not to move them",
        )
    pictures = of_subject(images, source)
    prior = class_prompt is not None and prior_weight > 0
    if class_images is not None and not prior:
        raise ValueError("class_images: got some, expected a class_prompt and a prior_weight with them")
    given = None if class_images is None else learnable(class_images, source, "class_images")
    num_class_images = min(num_class_images, steps * batch_size) if prior else 0
    settings = {
        "method": "dreambooth",
        "model": models.fingerprint(source),
        "images": digest(pictures),
        "prompt": prompt,
        "class_prompt": class_prompt,
        "class_images": num_class_images if given is None else digest(given),
        "noise_phrase": noise_phrase,
        "mode": mode,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "prior_weight": prior_weight,
        "train_text_encoder": train_text_encoder,
        "rank": rank if mode == "lora" else None,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
    }
    kept = None if checkpoint is None else Checkpoint(checkpoint, settings)
    sets = [Examples(source, pictures, with_noise(prompt, noise_phrase))]
    if class_prompt is not None and prior:
        if given is None:
            if processes(source.device).is_main_process:
                warn(f"class_images: got none, the model draws {num_class_images} of {class_prompt!r}")
            wanted = {class_prompt: range(num_class_images)}
            given = drawn_pictures(source, wanted, seed, checkpoint, progress)[class_prompt]
        sets.append(Examples(source, given, without_noise(class_prompt, noise_phrase), weight=prior_weight))
    student = Student(source, mode, train_text_encoder=train_text_encoder, rank=rank, seed=seed)
    if recompute:
        student.model.unet.enable_gradient_checkpointing()
    count = len(sets) * batch_size
    losses = train(
        student,
        denoising(student, partial(_rows, sets, batch_size), count, seed),
        steps,
        learning_rate=learning_rate,
        count=count,
        max_grad_norm=max_grad_norm,
        batch=rows,
        checkpoint=kept,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    return _finished(student, source, losses, settings)


def _rows(sets: list[Examples], batch_size: int, step: int, draws: Draws) -> list[Row]:
    """What a step learns: of each set `batch_size` pictures, all in a random order again and again."""
    found = []
    for slot, item in enumerate(of_step(draws, step, batch_size, max(map(len, sets)))):
        for part, examples in enumerate(sets):
            number = part * batch_size + slot
            z = examples.latents(item % len(examples), draws, number, step)
            found.append(Row(number, z, examples.prompt, examples.weight / batch_size))
    return found


def _finished(
    student: Student, source: DiffusionModel, losses: Tensor, settings: dict[str, Any]
) -> Personalized:
    """The pipeline as it draws, in the dtype that it came with."""
    student.clear()
    pipe = student.model.pipe
    pipe.unet.disable_gradient_checkpointing()
    for name in {key.partition(".")[0] for key in student.weights}:
        network = getattr(pipe, name).requires_grad_(False)
        dtype = getattr(source.pipe, name).dtype
        if student.mode != "lora" and network.dtype != dtype:
            nn.Module.to(network, dtype)  # that of diffusers warns of every cast
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    write = (
        partial(_write_lora, pipe, student.trains_text) if student.mode == "lora" else pipe.save_pretrained
    )
    return Personalized(pipe, losses, settings, settings["noise_phrase"], write)


def _write_lora(pipe: Any, trains_text: bool, folder: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    def layers(network: Any) -> dict[str, Tensor]:
        return convert_state_dict_to_diffusers(get_peft_model_state_dict(network))

    text = {}
    if trains_text:
        text["text_encoder_lora_layers"] = layers(pipe.text_encoder)
        if hasattr(pipe, "text_encoder_2"):
            text["text_encoder_2_lora_layers"] = layers(pipe.text_encoder_2)
    type(pipe).save_lora_weights(folder, unet_lora_layers=layers(pipe.unet), **text)
