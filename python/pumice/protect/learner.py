"""A surrogate, what it learns, and what pictures climb against it: for FSMG, ASPL and MetaCloak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from pumice.models import DiffusionModel, NoiseSchedule, PromptEmbeds
from pumice.models.arguments import check_prompt
from pumice.models.draws import Draws
from pumice.training.examples import Examples
from pumice.training.student import Mode

from .arguments import checked_models
from .dreambooth import class_examples
from .latent import LatentObjective, denoising_gradient
from .pgd import PGD, Options
from .pictures import Pictures
from .surrogate import Surrogate
from .targets import target_latents


class SurrogateOptions(Options, total=False):
    """What the methods that train a surrogate take beside their own arguments and those of `Options`.

    class_images: what the surrogate learns beside the subject, so that it does not drift. By default the
        model draws them under the class prompt, by 50 steps of DDIM with guidance 7.5; only those that
        training reaches.
    num_class_images: how many there are to draw. Default 200, of Anti-DreamBooth's code (arXiv:2303.15433).
    prior_weight: of the class in the surrogate's loss; 0 does without it. Default 1, of the same.
    surrogate: what of it is trained. "fp32_master", all weights, is the default; "lora" takes far less
        memory; "bf16_faithful" is the released code, all weights in bfloat16, where rounding swallows the
        update of 99 % of them.
    lr: of the surrogate. Default 5e-7, of the same code; with "lora" 5e-4, of the same.
    train_text_encoder: of the surrogate, too, unless it is "lora". Default True, of the same.
    """

    class_images: Any
    num_class_images: int
    prior_weight: float
    surrogate: Mode
    lr: float | None
    train_text_encoder: bool


class Learner:
    """A surrogate of one model, that learns a subject.

    Args:
        surrogate: that learns.
        prompt: what it learns the subject under.
        clean: pictures of the subject.
        classes: those of its class, or none.
        objective: the surrogate's loss, for `PGD`.
    """

    def __init__(
        self,
        surrogate: Surrogate,
        prompt: str,
        clean: Sequence[Tensor],
        classes: Sequence[Examples],
        objective: LatentObjective,
    ) -> None:
        self.surrogate, self.objective = surrogate, objective
        self._prompt, self._classes = prompt, classes
        self._clean = self._examples(clean)

    def learn(
        self,
        steps: int,
        pictures: Sequence[Tensor] | None = None,
        *,
        batch_size: int = 1,
        after: Callable[[int], object] = lambda step: None,
    ) -> None:
        """Train on pictures of the subject, by default the clean ones, and on its class; see `Surrogate`."""
        subject = self._clean if pictures is None else self._examples(pictures)
        self.surrogate.train([subject, *self._classes], steps, batch_size=batch_size, after=after)

    def _examples(self, pictures: Sequence[Tensor]) -> Examples:
        return Examples(self.surrogate.model, pictures, self._prompt)


def learners(
    images: Any,
    pipe: Any,
    prompt: str,
    class_prompt: str,
    *,
    clean_images: Any = None,
    target: Any = None,
    needed: int,
    eps: float,
    random_start: bool,
    class_images: Any = None,
    num_class_images: int = 200,
    prior_weight: float = 1.0,
    surrogate: Mode = "fp32_master",
    lr: float | None = None,
    train_text_encoder: bool = True,
    **options: Unpack[Options],
) -> tuple[PGD, list[Learner]]:
    """The pictures, ready to climb, and one learner for each model, or none where eps is 0.

    Args:
        needed: how many class images a training can meet.
        others: as of the methods.
    """
    check_prompt("prompt", prompt)
    seed, progress = options.get("seed", 0), options.get("progress", False)
    surrogates = [
        Surrogate(model, surrogate, lr=lr, train_text_encoder=train_text_encoder, seed=seed)
        for model in checked_models(pipe)
    ]
    pgd = PGD(images, [each.model for each in surrogates], eps=eps, random_start=random_start, **options)
    if pgd.eps == 0:
        return pgd, []
    clean = pgd.pictures.working
    if clean_images is not None:
        size = options.get("size", "resize")
        clean = Pictures(clean_images, pgd.models, size=size, name="clean_images").working
    found = []
    for each in surrogates:
        objective = _objective(each.model, each.embeds(prompt), target, pgd.pictures)
        classes = class_examples(
            each.model,
            class_images,
            class_prompt,
            count=num_class_images,
            needed=needed,
            weight=prior_weight,
            seed=seed,
            progress=progress,
        )
        found.append(Learner(each, prompt, clean, classes, objective))
    return pgd, found


def _objective(
    model: DiffusionModel, embeds: PromptEmbeds, target: Any, pictures: Pictures
) -> LatentObjective:
    if target is None:

        def untargeted(z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
            return denoising_gradient(model, z, t, noise, embeds)

        return LatentObjective(model, untargeted, sample=True, noised=True)

    def targeted(z: Tensor, t: Tensor, noise: Tensor, z_y: Tensor, posterior_noise: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            z_t = model.add_noise(z, noise, t)
            output = model.predict(z_t, t, embeds).to(z.dtype)
            error = output - model.schedule.target(z, noise, t)
            step, wanted = _ddpm_step(model.schedule, output, z_t, t, posterior_noise, z_y, noise)
            loss = error.square().sum() - (step - wanted).square().sum()
        (gradient,) = torch.autograd.grad(loss, z)
        return gradient

    constants = [target_latents(target, model, pictures)]
    return _Targeted(model, targeted, sample=True, noised=True, constants=constants)


class _Targeted(LatentObjective):
    """Draws the noise of a DDPM step, too."""

    def inputs(
        self,
        pictures: Sequence[int],
        step: int,
        size: tuple[int, int],
        draws: Draws,
        timesteps: Sequence[Tensor] | None,
    ) -> tuple[Tensor, ...]:
        drawn = super().inputs(pictures, step, size, draws, timesteps)
        return *drawn, draws.normal(pictures, "ddpm", step, self.model.latent_shape(*size))


def _ddpm_step(
    schedule: NoiseSchedule,
    output: Tensor,
    z_t: Tensor,
    t: Tensor,
    posterior_noise: Tensor,
    z_y: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """z_{t-1} of an ancestral step (arXiv:2006.11239, the smaller variance), and z_y noised to t - 1."""
    now, before = schedule.alpha_sigma(t), schedule.alpha_sigma((t - 1).clamp(min=0))
    alpha, sigma, alpha_p, sigma_p = (each.view(-1, 1, 1, 1) for each in (*now, *before))
    first = (t == 0).view(-1, 1, 1, 1)  # before it there is no noise
    alpha_p, sigma_p = torch.where(first, 1, alpha_p), torch.where(first, 0, sigma_p)
    ratio = alpha / alpha_p
    beta = 1 - ratio**2
    weights = alpha_p * beta / sigma**2, ratio * sigma_p**2 / sigma**2, sigma_p / sigma * beta.sqrt()
    of_x0, of_z, of_noise, alpha_p, sigma_p = (each.to(z_t.dtype) for each in (*weights, alpha_p, sigma_p))
    step = of_x0 * schedule.to_x0(output, z_t, t) + of_z * z_t + of_noise * posterior_noise
    return step, alpha_p * z_y + sigma_p * noise
