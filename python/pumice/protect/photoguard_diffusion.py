"""PhotoGuard (Salman et al., ICML 2023), the diffusion attack: what img2img draws becomes a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pumice.models import DiffusionModel, NoiseSchedule, vae
from pumice.models.arguments import check_budget, check_number, check_scale, checked_count, checked_prompt
from pumice.models.draws import Draws

from .pgd import PGD, Options
from .pictures import Pictures
from .targets import target_image

_DEFAULTS = {"l2": (8.0, 0.5), "linf": (0.05, 0.003)}  # eps, step_size


@torch.inference_mode(False)
def photoguard_diffusion(
    images: Any,
    pipe: Any,
    target: Any = "grey",
    *,
    norm: Literal["l2", "linf"] = "l2",
    eps: float | None = None,
    step_size: float | None = None,
    steps: int = 200,
    strength: float = 0.5,
    num_inference_steps: int = 8,
    eta: float = 1.0,
    grad_reps: int = 10,
    reps_per_pass: int | None = None,
    **options: Unpack[Options],
) -> Any:
    """Perturb pictures so that img2img draws a target from them: the attack through the whole sampler.

    ::

        L(x) = -mean over r of |D(sampler(alpha z_r + sigma epsilon_r)) - y|_2        z_r = a sample of E(x)

    climbed by PGD, the sampler being the last steps of DDIM with the empty prompt (Salman et al.,
    arXiv:2302.06588). A step takes `grad_reps` draws of all noises, as one batch; one pass of the encoder
    serves them all. Guidance is left out, which changes nothing: with the empty prompt its two predictions
    are the same, out = uncond + guidance_scale (cond - uncond) = uncond.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        pipe: a pipeline, a `DiffusionModel`, or several, whose losses are summed.
        target: y: "grey", which is 0 in [-1, 1], the authors' default; None for `protect.text_pattern`; or a
            picture of the same size: a tensor, a PIL image or a path.
        norm: of the budget. "l2" steps along the gradient divided by its norm, "linf" along its sign.
        eps: for "l2" the largest norm of a whole picture's change, default 8, the authors' 16 of 512 x 512
            pictures in [-1, 1]; for "linf" the largest change of a value, default 0.05, their 0.1.
        step_size: default 0.5 for "l2", 0.003 for "linf", the authors' 1 and 0.006.
        steps: default 200, of the authors' code.
        strength: how far pictures are noised, as of diffusers' img2img: `num_inference_steps` times it are
            the sampler's last steps that are taken. Default 0.5.
        num_inference_steps: of the whole sampler. Default 8, so that 4 are taken, as by the authors.
        eta: noise of the sampler, 0 for none. Default 1, of the authors' code.
        grad_reps: draws a step. Default 10, of the same.
        reps_per_pass: how many of them go through the denoiser together; default all. Fewer take less
            memory, and so does `recompute`, which keeps one call of the denoiser at a time and computes all
            others again.
        options: `protect.Options`; `timesteps` do not apply.

    Returns:
        The perturbed pictures, in the form in which they came.

    The authors attack an inpainting model, which takes the picture as a condition beside pure noise; here it
    is where a text-to-image model begins (img2img), and only what `mask` allows is changed.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    if norm not in _DEFAULTS:
        raise ValueError(f"norm: got {norm!r}, expected 'l2' or 'linf'")
    eps, step_size = (
        default if given is None else given
        for default, given in zip(_DEFAULTS[norm], (eps, step_size), strict=True)
    )
    check_scale("eps", eps)
    if norm == "linf":
        check_budget("step_size", step_size)
    else:
        check_scale("step_size", step_size, positive=True)
    check_number("strength", strength)
    check_number("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected 0 to 1")
    steps, grad_reps = checked_count("steps", steps), checked_count("grad_reps", grad_reps)
    together = grad_reps if reps_per_pass is None else checked_count("reps_per_pass", reps_per_pass)
    pgd = PGD(images, pipe, eps=eps, random_start=False, norm=norm, rows=together, **options)
    targets = _targets(target, pgd.pictures)

    def objective(model: DiffusionModel) -> Img2Img:
        taken = ddim_steps(model.schedule, strength, num_inference_steps, eta)
        return Img2Img(model, taken, targets, grad_reps, together)

    pgd.ascend([objective(model) for model in pgd.models], steps, step_size)
    return pgd.finish()


class _Step(NamedTuple):
    """x_{t-1} = x * x_t + output * (the denoiser's output) + noise * (standard normal)."""

    t: int
    x: float
    output: float
    noise: float


def ddim_steps(schedule: NoiseSchedule, strength: float, num_inference_steps: int, eta: float) -> list[_Step]:
    """The last steps of DDIM (arXiv:2010.02502) that img2img takes, as those of diffusers."""
    coefficients = schedule.ddim_coefficients(num_inference_steps)
    taken = int(num_inference_steps * strength) if 0 <= strength <= 1 else 0
    if not taken:
        raise ValueError(f"strength: got {strength}, expected {1 / num_inference_steps:g}, one step, to 1")
    timesteps = schedule.timesteps(num_inference_steps).tolist()
    x_t, output = torch.eye(
        2, dtype=torch.float64
    )  # a step is linear: what it makes of these are its weights
    steps = []
    for t, (alpha, sigma, alpha_next, sigma_next) in zip(
        timesteps[-taken:], coefficients[-taken:], strict=True
    ):
        noise = eta * sigma_next / sigma * (1 - (alpha / alpha_next) ** 2).clamp(min=0).sqrt()
        along = (sigma_next**2 - noise**2).clamp(min=0).sqrt()
        new = alpha_next * schedule.to_x0(output, x_t, t) + along * schedule.to_epsilon(output, x_t, t)
        of_x, of_output = new.tolist()
        steps.append(_Step(t, of_x, of_output, float(noise)))
    return steps


class Img2Img:
    """-|D(sampler(z)) - y|_2, summed over draws of z and of the sampler's noise."""

    def __init__(
        self,
        model: DiffusionModel,
        steps: Sequence[_Step],
        targets: Sequence[Tensor],
        reps: int,
        together: int,
    ) -> None:
        self.noised, self.model = False, model
        self._steps, self._reps, self._together = steps, reps, together
        self._targets = [y.to(model.device) for y in targets]
        self._embeds = checked_prompt(model, "")
        self._alpha, self._sigma = map(float, model.schedule.alpha_sigma(steps[0].t))

    def inputs(
        self,
        pictures: Sequence[int],
        step: int,
        size: tuple[int, int],
        draws: Draws,
        timesteps: Sequence[Tensor] | None,
    ) -> tuple[Tensor, ...]:
        """Noise (n, *`noise_shape`) and y."""
        y = torch.stack([self._targets[picture] for picture in pictures])
        return draws.normal(pictures, "img2img", step, self.noise_shape(size)), y

    def noise_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(reps, 2 + steps, C, h, w) for a picture of `size`: of the posterior, the start, and each step."""
        noises = 2 + sum(each.noise > 0 for each in self._steps)
        return self._reps, noises, *self.model.latent_shape(*size)

    def gradient(self, images: Tensor, *inputs: Tensor, recompute: bool = False) -> Tensor:
        noise, y = inputs
        noise = noise.transpose(0, 1)  # (reps, n, 2 + steps, C, h, w): samples of one posterior for all

        def cotangent(z: Tensor) -> Tensor:
            parts = zip(z.split(self._together), noise[:, :, 1:].split(self._together), strict=True)
            return torch.cat([self._pull(*part, y, recompute) for part in parts])

        return self.model.vjp(images, cotangent, noise=noise[:, :, 0], recompute=recompute)

    def _pull(self, z: Tensor, noise: Tensor, y: Tensor, recompute: bool) -> Tensor:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            away = self._drawn(z.flatten(0, 1), noise.flatten(0, 1), recompute) - y.repeat(len(z), 1, 1, 1)
            # times the root of the number of values: gradients of about 1, that half precision holds
            loss = torch.linalg.vector_norm(away, dim=(1, 2, 3)).sum() * math.sqrt(y[0].numel())
        (gradient,) = torch.autograd.grad(loss, z)
        return -gradient

    def _drawn(self, z: Tensor, noise: Tensor, recompute: bool) -> Tensor:
        """Pictures, not clamped: of latents z (n, C, h, w), with noise (n, 1 + steps, C, h, w)."""
        start, *added = noise.unbind(1)
        x = self._alpha * z + self._sigma * start
        for step in self._steps:
            if recompute:
                output = checkpoint(self._predict, x, step.t, use_reentrant=False, preserve_rng_state=False)
            else:
                output = self._predict(x, step.t)
            x = step.x * x + step.output * output
            if step.noise:
                x = x + step.noise * added.pop(0)
        return vae.decode(self.model.vae, x, upcast=self.model.upcast_vae).to(x.dtype)

    def _predict(self, x: Tensor, t: int) -> Tensor:
        timesteps = torch.full((len(x),), t, device=x.device)  # filled there: nothing is copied from the host
        return self.model.predict(x, timesteps, self._embeds).to(x.dtype)


def _targets(target: Any, pictures: Pictures) -> list[Tensor]:
    """For each working picture its target (3, h, w)."""
    if isinstance(target, str) and target == "grey":
        return [torch.full_like(picture, 0.5) for picture in pictures.working]
    return [
        target_image(target, number, pictures.given, (picture.shape[1], picture.shape[2]))
        for (number, _), picture in zip(pictures.parts, pictures.working, strict=True)
    ]
