"""FSMG of Anti-DreamBooth (Le et al., ICCV 2023): pictures climb the loss of a model that knows them."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from tqdm.auto import tqdm

from pumice.models.arguments import check_budget, checked_count

from .learner import SurrogateOptions, learners


@torch.inference_mode(False)  # a caller's inference mode would leave nothing to differentiate
def fsmg(
    images: Any,
    pipe: Any,
    prompt: str = "a photo of sks person",
    class_prompt: str = "a photo of person",
    *,
    clean_images: Any = None,
    target: Any = None,
    train_steps: int = 1000,
    train_batch_size: int = 2,
    eps: float = 0.025,
    step_size: float = 0.0025,
    steps: int = 100,
    random_start: bool = False,
    **options: Unpack[SurrogateOptions],
) -> Any:
    """Perturb pictures of a subject against a surrogate that learned it: fully trained surrogate guidance.

    ::

        theta* = theta after DreamBooth on clean pictures
        L(x)   = E_{t, epsilon} |epsilon_theta*(z_t, t, c) - epsilon|^2              z = a sample of E(x)
        with a target y, T-FSMG: L(x) - E |DDPM step from z_t - (z_y noised to t - 1)|^2

    climbed by PGD with one t and one epsilon a step (Le et al., arXiv:2303.15433).

    Args:
        images: of one subject, (B, 3, H, W) in [0, 1], PIL images or paths.
        pipe: a pipeline, a `DiffusionModel`, or several, whose losses are summed.
        prompt: c, what the subject will be called, with a rare word for its name.
        class_prompt: what it is one of.
        clean_images: what the surrogate learns, other pictures of the subject. Default `images` themselves.
        target: y, of the pictures' size: a tensor, a PIL image or a path; `protect.text_pattern` makes one.
            None is untargeted.
        train_steps: of the surrogate. Default 1000, the paper's.
        train_batch_size: pictures in each, and as many of the class. Default 2, the paper's.
        eps: the largest change of a value. Default 0.025, the paper's 0.05 of pictures in [-1, 1].
        step_size: of a step. Default 0.0025, the paper's 0.005.
        steps: default 100, the paper's.
        random_start: default no, as the authors' code does.
        options: `protect.SurrogateOptions`.

    Returns:
        The perturbed pictures, in the form in which they came.

    Differences from the released code: weights are trained in float32 (`surrogate`); class images are drawn
    by DDIM; training takes pictures in their order, and samples of their posteriors from one encoding; in the
    targeted term z_y is the mean of its posterior, and at t = 0 it meets no noise, where the code takes that
    of the last timestep.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    steps, train_steps = checked_count("steps", steps), checked_count("train_steps", train_steps, least=0)
    train_batch_size = checked_count("train_batch_size", train_batch_size)
    check_budget("step_size", step_size)
    pgd, found = learners(
        images,
        pipe,
        prompt,
        class_prompt,
        clean_images=clean_images,
        target=target,
        needed=train_steps * train_batch_size,
        eps=eps,
        random_start=random_start,
        **options,
    )
    with tqdm(total=train_steps * len(found), unit="training step", disable=not pgd.progress) as bar:
        for learner in found:
            learner.learn(train_steps, batch_size=train_batch_size, after=lambda _: bar.update())
    pgd.ascend([learner.objective for learner in found], steps, step_size)
    return pgd.finish()
