"""MetaCloak (Liu et al., CVPR 2024): a pool of surrogates, and pictures as they may be transformed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice.models.arguments import check_budget, checked_count

from .learner import Learner, SurrogateOptions, learners
from .transforms import Blur, Flip, Transform

_TRANSFORMS: Sequence[Transform] = Blur(kernel_size=7, sigma=(0.1, 2.0)), Flip()


@torch.inference_mode(False)  # a caller's inference mode would leave nothing to differentiate
def metacloak(
    images: Any,
    pipe: Any,
    prompt: str = "a photo of sks person",
    class_prompt: str = "a photo of person",
    *,
    train_steps: int = 1000,
    interval: int = 200,
    trials: int = 4,
    rounds: int = 100,
    advance_steps: int = 2,
    steps: int = 6,
    eps: float = 11 / 255,
    step_size: float | None = None,
    random_start: bool = False,
    **options: Unpack[SurrogateOptions],
) -> Any:
    """Perturb pictures of a subject against surrogates of every age, and against transformations.

    ::

        max over x of E_{theta, g} |epsilon_theta(z_t, t, c) - epsilon|^2        z = a sample of E(g(x))

    (Liu et al., arXiv:2311.13127.) A surrogate learns the clean pictures by DreamBooth; the pool has it as it
    was at the start and after every `interval` steps. In each trial each member of the pool, taken as it was,
    goes through `rounds` rounds of `steps` steps of PGD and `advance_steps` of DreamBooth on the pictures as
    they are by then.

    Args:
        images: of one subject, (B, 3, H, W) in [0, 1], PIL images or paths.
        pipe: a pipeline, a `DiffusionModel`, or several, each with a pool of its own, which take turns.
        prompt: c, what the subject will be called, with a rare word for its name.
        class_prompt: what it is one of.
        train_steps: on the clean pictures. Default 1000, as all numbers here of the authors' code.
        interval: between members of the pool. Default 200, for 6 members.
        trials: through the pool. Default 4.
        rounds: of a member. Default 100.
        advance_steps: of training in a round. Default 2: of more than two pictures it sees the first two.
        steps: of PGD in a round. Default 6, for 14,400 in all.
        eps: the largest change of a value. Default 11/255.
        step_size: of a step. Default a tenth of `eps`.
        random_start: default no.
        options: `protect.SurrogateOptions`. transforms, g, are by default a Gaussian blur of 7 pixels, sigma
            from 0.1 to 2, and a horizontal flip of every second picture; () is none.

    Returns:
        The perturbed pictures, in the form in which they came.

    Differences from the released code: weights are trained in float32 (`surrogate`); class images are drawn
    by DDIM; training takes pictures in their order; each picture has a transformation of its own, where the
    code draws one for all; its inner attacker, of radius 0, is left out.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    train_steps = checked_count("train_steps", train_steps, least=0)
    advance_steps = checked_count("advance_steps", advance_steps, least=0)
    interval, trials = checked_count("interval", interval), checked_count("trials", trials)
    rounds, steps = checked_count("rounds", rounds), checked_count("steps", steps)
    check_budget("eps", eps)
    step_size = eps / 10 if step_size is None else step_size
    check_budget("step_size", step_size)
    options.setdefault("transforms", _TRANSFORMS)
    pgd, found = learners(
        images,
        pipe,
        prompt,
        class_prompt,
        needed=max(train_steps, advance_steps),
        eps=eps,
        random_start=random_start,
        **options,
    )
    with tqdm(total=train_steps * len(found), unit="training step", disable=not pgd.progress) as bar:
        pools = [_pool(learner, train_steps, interval, bar) for learner in found]
    total = trials * sum(map(len, pools)) * rounds * steps
    with tqdm(total=total, unit="step", disable=not pgd.progress) as bar:
        for _ in range(trials):
            for learner, pool in zip(found, pools, strict=True):
                for snapshot in pool:
                    learner.surrogate.restore(snapshot)
                    for _ in range(rounds):
                        pgd.ascend([learner.objective], steps, step_size, bar=bar)
                        learner.learn(advance_steps, pgd.images)
    return pgd.finish()


def _pool(learner: Learner, steps: int, interval: int, bar: tqdm[Any]) -> list[list[Tensor]]:
    """The surrogate as it is before training, and after every `interval` steps."""
    found = [learner.surrogate.snapshot()]

    def after(step: int) -> None:
        bar.update()
        if step % interval == 0:
            found.append(learner.surrogate.snapshot())

    learner.learn(steps, after=after)
    return found
