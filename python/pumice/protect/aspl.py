"""ASPL and E-ASPL of Anti-DreamBooth (Le et al., ICCV 2023): surrogate and perturbation learn in turn."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from tqdm.auto import tqdm

from pumice.models.arguments import check_budget, checked_count

from .arguments import checked_models
from .learner import SurrogateOptions, learners


def aspl(
    images: Any,
    pipe: Any,
    prompt: str = "a photo of sks person",
    class_prompt: str = "a photo of person",
    *,
    clean_images: Any = None,
    target: Any = None,
    max_train_steps: int = 50,
    max_f_train_steps: int = 3,
    max_adv_train_steps: int = 6,
    eps: float = 0.025,
    step_size: float = 0.0025,
    random_start: bool = False,
    **options: Unpack[SurrogateOptions],
) -> Any:
    """Perturb pictures of a subject against a surrogate that keeps learning them as they are by then.

    Alternating surrogate and perturbation learning (Le et al., arXiv:2303.15433). From the model f, in each
    of `max_train_steps` rounds::

        f' = f after max_f_train_steps steps of DreamBooth on the clean pictures
        x  = x after max_adv_train_steps steps of PGD up the loss of f', that of `fsmg`
        f  = f after max_f_train_steps steps of DreamBooth on x

    Args:
        images, prompt, class_prompt, clean_images, target, eps, step_size, random_start: as of `fsmg`.
        pipe: a pipeline or a `DiffusionModel`; several are for `easpl`.
        max_train_steps: rounds. Default 50, as the next two of the authors' code.
        max_f_train_steps: of either training of a round. Default 3: of more than three pictures it sees the
            first three.
        max_adv_train_steps: of PGD in a round. Default 6.
        options: `protect.SurrogateOptions`.

    Returns:
        The perturbed pictures, in the form in which they came.

    Differences from the released code: those of `fsmg`. With `surrogate="lora"`, f' is a copy, too; in that
    code it is f itself, which so learns the clean pictures.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    if len(checked_models(pipe)) > 1:
        raise ValueError(f"pipe: got {len(pipe)} models, expected one; `easpl` is for several")
    return easpl(
        images,
        pipe,
        prompt,
        class_prompt,
        clean_images=clean_images,
        target=target,
        max_train_steps=max_train_steps,
        max_f_train_steps=max_f_train_steps,
        max_adv_train_steps=max_adv_train_steps,
        eps=eps,
        step_size=step_size,
        random_start=random_start,
        **options,
    )


@torch.inference_mode(False)  # a caller's inference mode would leave nothing to differentiate
def easpl(
    images: Any,
    pipe: Any,
    prompt: str = "a photo of sks person",
    class_prompt: str = "a photo of person",
    *,
    clean_images: Any = None,
    target: Any = None,
    max_train_steps: int = 50,
    max_f_train_steps: int = 3,
    max_adv_train_steps: int = 6,
    eps: float = 0.025,
    step_size: float = 0.0025,
    random_start: bool = False,
    **options: Unpack[SurrogateOptions],
) -> Any:
    """`aspl` against several models: each does a round from the same pictures, which go on as the mean.

    Args:
        pipe: pipelines or `DiffusionModel`s, each with a surrogate of its own.
        others: as of `aspl`.

    Returns:
        The perturbed pictures, in the form in which they came.

    Raises:
        As `aspl`.
    """
    rounds = checked_count("max_train_steps", max_train_steps)
    train_steps = checked_count("max_f_train_steps", max_f_train_steps, least=0)
    steps = checked_count("max_adv_train_steps", max_adv_train_steps)
    check_budget("step_size", step_size)
    pgd, found = learners(
        images,
        pipe,
        prompt,
        class_prompt,
        clean_images=clean_images,
        target=target,
        needed=train_steps,
        eps=eps,
        random_start=random_start,
        **options,
    )
    with tqdm(total=rounds * steps * len(found), unit="step", disable=not pgd.progress) as bar:
        for _ in range(rounds if found else 0):
            start, ends = pgd.state, []
            for learner in found:
                pgd.state = start
                with learner.surrogate.scratch():
                    learner.learn(train_steps)
                    pgd.ascend([learner.objective], steps, step_size, bar=bar)
                ends.append(pgd.state)
                learner.learn(train_steps, pgd.images)
            pgd.state = [torch.stack(pictures).mean(0) for pictures in zip(*ends, strict=True)]
    return pgd.finish()
