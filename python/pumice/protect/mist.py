"""Mist (Liang and Wu, 2023): latents pulled to a pattern, pushed from what the denoiser expects, or both."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from pumice.models import DiffusionModel
from pumice.models.arguments import check_budget, check_scale, checked_count, checked_prompt

from .latent import LatentObjective, denoising_gradient
from .pgd import PGD, Options
from .targets import target_latents


@torch.inference_mode(False)
def mist(
    images: Any,
    pipe: Any,
    prompt: str = "a painting",
    *,
    target: Any = None,
    mode: Literal["fused", "texture", "semantic"] = "fused",
    rate: float = 1e4,
    eps: float = 16 / 255,
    step_size: float = 1 / 255,
    steps: int = 100,
    random_start: bool = True,
    **options: Unpack[Options],
) -> Any:
    """Perturb pictures so that their latents are a pattern's, the denoising loss grows, or both.

    ::

        texture    L(x) = -|z - z_y|^2                              z = a sample of E(x), z_y of the target y
        semantic   L(x) = E_{t, epsilon} mean (epsilon_theta(z_t, t, c) - epsilon)^2          (AdvDM)
        fused      L(x) = -|z - z_y|^2 + rate * E_{t, epsilon} mean (...)^2

    climbed by PGD with one t and one epsilon a step (Liang and Wu, arXiv:2305.12683). All terms meet in the
    latents: one pass of the encoder a step, and one of the denoiser unless the mode is "texture", each
    forward and backward. The target is encoded once.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        pipe: a pipeline, a `DiffusionModel`, or several, whose losses are summed.
        prompt: c, what the pictures are called.
        target: y, of the pictures' size: a tensor, a PIL image or a path. Default `protect.text_pattern`.
        mode: above. Default "fused", mode 2 of the authors' code.
        rate: weight of the semantic term. Default 1e4, that of the code.
        eps: the largest change of a value. Default 16/255, of the code.
        step_size: of a step. Default 1/255, of the code.
        steps: default 100, of the code.
        random_start: as the code does.
        options: `protect.Options`.

    Returns:
        The perturbed pictures, in the form in which they came.

    The target's latents are the mean of its posterior; the code draws a new sample at each step.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    if mode not in ("fused", "texture", "semantic"):
        raise ValueError(f"mode: got {mode!r}, expected 'fused', 'texture' or 'semantic'")
    check_scale("rate", rate)
    steps = checked_count("steps", steps)
    check_budget("step_size", step_size)
    pgd = PGD(images, pipe, eps=eps, random_start=random_start, **options)
    objectives = [_objective(model, prompt, target, mode, rate, pgd) for model in pgd.models]
    pgd.ascend(objectives, steps, step_size)
    return pgd.finish()


def _objective(
    model: DiffusionModel, prompt: str, target: Any, mode: str, rate: float, pgd: PGD
) -> LatentObjective:
    constants = [] if mode == "semantic" else [target_latents(target, model, pgd.pictures)]

    def texture(z: Tensor, z_y: Tensor) -> Tensor:
        return -2 * (z - z_y)

    if mode == "texture":
        return LatentObjective(model, texture, sample=True, noised=False, constants=constants)
    embeds = checked_prompt(model, prompt)

    def semantic(z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return rate / z[0].numel() * denoising_gradient(model, z, t, noise, embeds)

    def fused(z: Tensor, t: Tensor, noise: Tensor, z_y: Tensor) -> Tensor:
        return texture(z, z_y) + semantic(z, t, noise)

    cotangent = semantic if mode == "semantic" else fused
    return LatentObjective(model, cotangent, sample=True, noised=True, constants=constants)
