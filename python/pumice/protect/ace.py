"""ACE, or Mist v2 (Zheng et al., ICLR 2025): noise predictions pulled to one and the same pattern."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice.models.arguments import check_budget, check_prompt, checked_count
from pumice.training.examples import Examples

from .arguments import checked_models
from .dreambooth import class_examples
from .latent import LatentObjective
from .pgd import PGD, Options
from .surrogate import Surrogate
from .targets import target_latents

_LATENT_WEIGHT = 100  # of the authors' code


@torch.inference_mode(False)
def ace(
    images: Any,
    pipe: Any,
    prompt: str = "a photo of sks person",
    *,
    target: Any = None,
    mode: Literal["lunet", "fused"] = "lunet",
    class_prompt: str = "a photo of person",
    class_images: Any = None,
    num_class_images: int = 50,
    prior_weight: float = 0.1,
    lr: float = 1e-4,
    epochs: int = 5,
    train_steps: int = 10,
    eps: float = 4 / 255,
    step_size: float = 0.0025,
    steps: int = 30,
    random_start: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Perturb pictures so that the denoiser predicts the same pattern for each of them, at every timestep.

    ::

        lunet    L(x) = -E_{t, epsilon} |epsilon_theta(z_t, t, c) - z_y|^2        z = the mean of E(x)
        fused    L(x) = -E_{t, epsilon} <epsilon_theta(z_t, t, c), epsilon> - 100 |z - z_y|^2

    with z_y the latents of a target y (Zheng et al., arXiv:2310.04687): what a model learns from such
    pictures is the pattern. In each epoch all pictures climb L by PGD, with one t and one epsilon a step, and
    a LoRA of rank 4 then learns them as they are. The pictures, which the authors' code takes one after the
    other, go together, and the target is encoded once. That code's mode for little memory is
    `recompute=True`.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        pipe: a pipeline, a `DiffusionModel`, or several, whose losses are summed; each has its LoRA.
        prompt: c, what the pictures are called.
        target: y, of the pictures' size: a tensor, a PIL image or a path. Default `protect.text_pattern`.
        mode: above, the modes of the authors' code.
        class_prompt: what pictures of the class are called.
        class_images: of the class, which the LoRA goes on learning; by default drawn by the pipeline.
        num_class_images: how many of them. Default 50, of the code. Each training begins with the first, so
            that no more than `train_steps` are seen, or drawn.
        prior_weight: of their loss. Default 0.1, of the code.
        lr: of the LoRA. Default 1e-4, of the code.
        epochs: default 5, of the code.
        train_steps: of the LoRA, in each epoch. Default 10, of the code.
        eps: the largest change of a value. Default 4/255, the code's 8/255 of pictures in [-1, 1]; its script
            has 0.04 of those, 5/255.
        step_size: of a step. Default 0.0025, the code's 0.005 of pictures in [-1, 1].
        steps: of PGD, in each epoch. Default 30, of the code.
        random_start: default no.
        options: `protect.Options`.

    Returns:
        The perturbed pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: if weights are quantised, offloaded or have a LoRA adapter.
    """
    if mode not in ("lunet", "fused"):
        raise ValueError(f"mode: got {mode!r}, expected 'lunet' or 'fused'")
    epochs, steps = checked_count("epochs", epochs), checked_count("steps", steps)
    train_steps = checked_count("train_steps", train_steps, least=0)
    check_budget("step_size", step_size)
    check_prompt("prompt", prompt)
    seed = options.get("seed", 0)
    surrogates = [Surrogate(model, "lora", lr=lr, seed=seed) for model in checked_models(pipe)]
    pgd = PGD(
        images, [surrogate.model for surrogate in surrogates], eps=eps, random_start=random_start, **options
    )
    if pgd.eps == 0:
        return pgd.finish()
    objectives = [_objective(surrogate, prompt, target, mode, pgd) for surrogate in surrogates]
    classes = [
        class_examples(
            surrogate.model,
            class_images,
            class_prompt,
            count=num_class_images,
            needed=train_steps,
            weight=prior_weight,
            seed=seed,
            progress=pgd.progress,
        )
        for surrogate in surrogates
    ]
    with tqdm(total=epochs * steps, unit="step", disable=not pgd.progress) as bar:
        for epoch in range(epochs):
            pgd.ascend(objectives, steps, step_size, bar=bar)
            if epoch + 1 == epochs:
                break  # no step would see what is learned now
            for surrogate, of_class in zip(surrogates, classes, strict=True):
                pictures = Examples(surrogate.model, pgd.images, prompt)
                surrogate.train([pictures, *of_class], train_steps)
    return pgd.finish()


def _objective(surrogate: Surrogate, prompt: str, target: Any, mode: str, pgd: PGD) -> LatentObjective:
    model, embeds = surrogate.model, surrogate.embeds(prompt)

    def cotangent(z: Tensor, t: Tensor, noise: Tensor, z_y: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            epsilon = model.predict_noise(model.add_noise(z, noise, t), t, embeds)
            if mode == "lunet":
                loss = (epsilon - z_y).square().sum()
            else:
                loss = (epsilon * noise).sum() + _LATENT_WEIGHT * (z - z_y).square().sum()
        (gradient,) = torch.autograd.grad(loss, z)
        return -gradient

    constants = [target_latents(target, model, pgd.pictures)]
    return LatentObjective(model, cotangent, sample=False, noised=True, constants=constants)
