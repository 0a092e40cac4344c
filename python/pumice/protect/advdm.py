"""AdvDM (Liang et al., ICML 2023): pictures whose noised latents the denoiser cannot denoise."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from pumice.models import DiffusionModel
from pumice.models.arguments import check_budget, checked_count, checked_prompt

from .latent import LatentObjective, denoising_gradient
from .pgd import PGD, Options


@torch.inference_mode(False)
def advdm(
    images: Any,
    pipe: Any,
    prompt: str = "a photo",
    *,
    direction: Literal["+", "-"] = "+",
    eps: float = 16 / 255,
    step_size: float = 1 / 255,
    steps: int = 100,
    random_start: bool = True,
    **options: Unpack[Options],
) -> Any:
    """Perturb pictures so that the denoising loss of their latents grows.

    ::

        L(x) = E_{t, epsilon} |epsilon_theta(z_t, t, c) - epsilon|^2        z = a sample of E(x)

    climbed by PGD with one t and one epsilon a step (Liang et al., arXiv:2302.04578; v for models that
    predict v). One pass of encoder and denoiser a step, forward and backward.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        pipe: a pipeline, a `DiffusionModel`, or several, whose losses are summed.
        prompt: c, what the pictures are called.
        direction: "+" climbs the loss as the paper does. "-" descends it (Xue et al., arXiv:2311.12832), for
            changes that are smoother and seen less.
        eps: the largest change of a value. Default 16/255 as in Xue et al.'s and Mist's code.
        step_size: of a step. Default 1/255, of the same.
        steps: default 100, of the same.
        random_start: as their code does.
        options: `protect.Options`.

    Returns:
        The perturbed pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    if direction not in ("+", "-"):
        raise ValueError(f"direction: got {direction!r}, expected '+' or '-'")
    steps = checked_count("steps", steps)
    check_budget("step_size", step_size)
    pgd = PGD(images, pipe, eps=eps, random_start=random_start, **options)
    pgd.ascend(
        [_objective(model, prompt) for model in pgd.models],
        steps,
        step_size if direction == "+" else -step_size,
    )
    return pgd.finish()


def _objective(model: DiffusionModel, prompt: str) -> LatentObjective:
    embeds = checked_prompt(model, prompt)

    def cotangent(z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return denoising_gradient(model, z, t, noise, embeds)

    return LatentObjective(model, cotangent, sample=True, noised=True)
