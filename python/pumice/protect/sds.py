"""Score distillation attacks (Xue et al., ICLR 2024): the denoiser's Jacobian left out."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from pumice.models import DiffusionModel
from pumice.models.arguments import check_budget, check_scale, checked_count, checked_prompt

from .latent import LatentObjective, score_difference
from .pgd import PGD, Options
from .targets import target_latents


@torch.inference_mode(False)
def sds(
    images: Any,
    pipe: Any,
    prompt: str = "a photo",
    *,
    direction: Literal["+", "-"] = "-",
    eps: float = 16 / 255,
    step_size: float = 1 / 255,
    steps: int = 100,
    random_start: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Perturb pictures along the score difference of their latents, SDS(+) or SDS(-).

    ::

        g(x) = J_E(x)^T (epsilon_theta(z_t, t, c) - epsilon)        z = a sample of E(x)

    (Xue et al., arXiv:2311.12832.) The denoiser is passed forward only; the encoder forward and backward.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        pipe: a pipeline, a `DiffusionModel`, or several, whose gradients are summed.
        prompt: c, what the pictures are called.
        direction: "-" steps against g, "+" along it. Default "-", which the authors recommend.
        eps: the largest change of a value. Default 16/255, of the authors' code.
        step_size: of a step. Default 1/255, of the same.
        steps: default 100, of the same.
        random_start: default no, as in the same.
        options: `protect.Options`.

    Returns:
        The perturbed pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    sign = _sign(direction)
    steps = checked_count("steps", steps)
    check_budget("step_size", step_size)
    pgd = PGD(images, pipe, eps=eps, random_start=random_start, **options)

    def objective(model: DiffusionModel) -> LatentObjective:
        embeds = checked_prompt(model, prompt)

        def cotangent(z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
            return sign * score_difference(model, z, t, noise, embeds)

        return LatentObjective(model, cotangent, sample=True, noised=True)

    pgd.ascend([objective(model) for model in pgd.models], steps, step_size)
    return pgd.finish()


@torch.inference_mode(False)
def sdst(
    images: Any,
    pipe: Any,
    prompt: str = "a photo",
    *,
    target: Any = None,
    rate: float = 5.0,
    direction: Literal["+", "-"] = "-",
    eps: float = 16 / 255,
    step_size: float = 1 / 255,
    steps: int = 100,
    random_start: bool = False,
    **options: Unpack[Options],
) -> Any:
    """`sds` with a target: the latents are pulled to those of a pattern, too.

    ::

        g(x) = J_E(x)^T (dir * rate * (epsilon_theta(z_t, t, c) - epsilon) - 2 (z - z_y))      dir = -1 or +1

    and x steps along g. Both terms share one sample z of E(x) and so one pass of the encoder; the authors'
    code draws a second one for the target's term, in passes of its own. The target is encoded once.

    Args:
        images, pipe, prompt, eps, step_size, steps, random_start, options: as of `sds`.
        target: y, of the pictures' size: a tensor, a PIL image or a path. Default `protect.text_pattern`.
        rate: weight of the score difference. Default 5, of the authors' code.
        direction: dir. Default "-".

    Returns:
        The perturbed pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    sign = _sign(direction)
    check_scale("rate", rate)
    steps = checked_count("steps", steps)
    check_budget("step_size", step_size)
    pgd = PGD(images, pipe, eps=eps, random_start=random_start, **options)

    def objective(model: DiffusionModel) -> LatentObjective:
        embeds = checked_prompt(model, prompt)

        def cotangent(z: Tensor, t: Tensor, noise: Tensor, z_y: Tensor) -> Tensor:
            return sign * rate * score_difference(model, z, t, noise, embeds) - 2 * (z - z_y)

        constants = [target_latents(target, model, pgd.pictures)]
        return LatentObjective(model, cotangent, sample=True, noised=True, constants=constants)

    pgd.ascend([objective(model) for model in pgd.models], steps, step_size)
    return pgd.finish()


def _sign(direction: str) -> int:
    if direction not in ("+", "-"):
        raise ValueError(f"direction: got {direction!r}, expected '+' or '-'")
    return 1 if direction == "+" else -1
