"""PhotoGuard (Salman et al., ICML 2023), the encoder attack: pictures with the latents of something else."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from pumice.models import DiffusionModel
from pumice.models.arguments import check_budget, checked_count

from .latent import LatentObjective
from .pgd import PGD, Options
from .targets import target_latents


@torch.inference_mode(False)
def photoguard(
    images: Any,
    pipe: Any,
    target: Any = "zero",
    *,
    eps: float = 0.03,
    step_size: float = 0.01,
    steps: int = 1000,
    random_start: bool = True,
    **options: Unpack[Options],
) -> Any:
    """Perturb pictures so that their latents become those of a target: the encoder attack.

    ::

        L(x) = -|mu_E(x) - z_y|_2        z_y = 0, or mu_E(y) of a target y

    climbed by PGD with steps that shrink linearly from `step_size` to a hundredth of it (Salman et al.,
    arXiv:2302.06588). The mean of the encoder's posterior, no noise, no denoiser. One pass of the encoder a
    step, forward and backward.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        pipe: a pipeline, a `DiffusionModel`, or several, whose losses are summed.
        target: "zero" for latents of zero, as for img2img in the authors' code; or a picture y, of the same
            size: a tensor, a PIL image or a path.
        eps: the largest change of a value. Default 0.03, the authors' 0.06 of pictures in [-1, 1].
        step_size: of the first step. Default 0.01, the authors' 0.02 for img2img.
        steps: default 1000, of the same; their demo has 200.
        random_start: as their code does.
        options: `protect.Options`.

    Returns:
        The perturbed pictures, in the form in which they came.

    The authors multiply the picture by the mask; here it stays as it was where the mask is 0. Their state is
    float16, in which their last steps vanish; here it is float32.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    steps = checked_count("steps", steps)
    check_budget("step_size", step_size)
    pgd = PGD(images, pipe, eps=eps, random_start=random_start, **options)

    def length(step: int) -> float:
        return step_size * (1 - 0.99 * step / steps)

    pgd.ascend([_objective(model, target, pgd) for model in pgd.models], steps, length)
    return pgd.finish()


def _objective(model: DiffusionModel, target: Any, pgd: PGD) -> LatentObjective:
    def cotangent(z: Tensor, z_y: Tensor | float = 0.0) -> Tensor:
        away = z - z_y
        return -away / torch.linalg.vector_norm(away, dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)

    zero = isinstance(target, str) and target == "zero"
    constants = [] if zero else [target_latents(target, model, pgd.pictures)]
    return LatentObjective(model, cotangent, sample=False, noised=False, constants=constants)
