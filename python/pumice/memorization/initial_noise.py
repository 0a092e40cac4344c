"""Noises that no longer lead to a memorized picture: initial-noise adjustment (Han et al., NeurIPS 2025)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice.memorization import arguments, engine
from pumice.memorization.descent import Evaluation, check_descent, descend
from pumice.models import DiffusionModel, PromptEmbeds, RowBudget

Mode = Literal["batch", "per_sample"]

UNGUIDED_ABOVE = 900
"""tau: after the batch-wise adjustment the paper samples without guidance while t > 900, of 1000 timesteps.

The value for Stable Diffusion 1.4; the adjustment alone only prepares for it.
"""

RHO = 50 / 128  # the paper's 50, in units of sqrt(D) of 512x512 pictures
_ITERATIONS: dict[Mode, int] = {"batch": 2, "per_sample": 50}


@dataclass(frozen=True, eq=False)
class NoiseAdjustment:
    """Adjusted noises of P prompts and S seeds.

    Attributes:
        prompts: as they were given.
        seeds: of the S initial noises.
        latents: (P, S, C, h, w) float32 on the CPU, of about unit variance: what
            `pipe(prompts, num_images_per_prompt=S, latents=found.latents.flatten(0, 1))` takes, in the
            denoiser's dtype (`.to(pipe.unet.dtype)`). The pipeline itself multiplies by its scheduler's
            `init_noise_sigma`.
        before, after: (P, S) float32, |epsilon_cond - epsilon_uncond| at the noise of each seed and at
            `latents`.
        converged: (P, S) bool, whether `after` is at most the target; None without a target.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    latents: Tensor
    before: Tensor
    after: Tensor
    converged: Tensor | None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; the latents themselves are left out."""
        return {
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "before": self.before.tolist(),
            "after": self.after.tolist(),
            "converged": None if self.converged is None else self.converged.tolist(),
        }


def adjust_initial_noise(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    seeds: int | Sequence[int] = 1,
    mode: Mode = "batch",
    target: float | None = None,
    max_iterations: int | None = None,
    gamma: float = 0.7,
    rho: float = RHO,
    lr: float = 0.01,
    weight_decay: float = 0.01,
    num_inference_steps: int = 50,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> NoiseAdjustment:
    """Move each initial noise to where its prompt pulls less, and so out of the memorized picture's reach.

    ::

        d(x) = epsilon(x, t, prompt) - epsilon(x, t, "")          t the sampler's first timestep
        batch:       x <- x - gamma (d(x + rho sqrt(D) d / |d|) - d(x))    max_iterations times
        per_sample:  x <- AdamW(x, gradient of |d(x)|)                     until |d| <= target

    (Han et al., arXiv:2510.08625.) Norms are per sample, over the D numbers of a latent; the noise of every
    prompt and seed moves by itself in either mode. "batch" needs no gradients, and the paper then samples
    without guidance while t > `UNGUIDED_ABOVE`; after "per_sample" it guides from the start.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel.
        prompts: one or more.
        seeds: of the initial noises: how many (0, 1, 2, ...), or which; the same ones for every prompt.
        mode: "batch" or "per_sample".
        target: |d| in epsilon that a noise is to reach; "per_sample" needs one (the paper: 0.7 to 1.5 for
            Stable Diffusion 1.4), "batch" only reports what has reached it.
        max_iterations: default 2 in "batch", the paper's, and at most 50 in "per_sample", our own.
        gamma: step size of "batch". Default 0.7, the paper's.
        rho: how far "batch" looks ahead, in units of sqrt(D), about the noise's own norm. Default 50 / 128:
            the paper's 50 for 512x512 pictures of Stable Diffusion 1, where sqrt(D) = 128.
        lr, weight_decay: of "per_sample". Default 0.01 both, the paper's.
        num_inference_steps: of the DDIM sampler whose first timestep is taken. Default 50.
        height, width: of the pictures, in px; default the model's own.
        batch_size: rows in one call of the denoiser, two for each noise; halved on out-of-memory.
        progress: show a bar.

    Returns:
        A `NoiseAdjustment`.

    Differences from the paper: rho scales with the latents' size; "per_sample" has a last step, ends with the
    best noise that it found, and skips non-finite gradients; v-predictions are converted to epsilon, so the
    paper's targets for Stable Diffusion 2, which are of raw outputs, are not comparable.

    Raises:
        TypeError: if a prompt is not a string, or seeds or max_iterations are not integers.
        ValueError: if there are no prompts or no seeds, for numbers out of range, an unknown mode, no target
            where one is needed, and for a model whose first step is pure noise (zero terminal SNR), or whose
            predictions are not finite.
        UnsupportedModelError: if the model's family is not supported.
    """
    prompts = arguments.checked_prompts(prompts)
    seeds = arguments.checked_seeds(seeds)
    if mode not in _ITERATIONS:
        raise ValueError(f"mode: got {mode!r}, expected 'batch' or 'per_sample'")
    if mode == "per_sample" and target is None:
        raise ValueError("target: got None, expected the |d| that mode 'per_sample' is to reach")
    max_iterations = _ITERATIONS[mode] if max_iterations is None else max_iterations
    check_descent(1.0 if target is None else target, max_iterations, lr, weight_decay)
    _check_batchwise(gamma, rho, max_iterations)
    budget = RowBudget(batch_size)
    model = models.load(pipe)
    timestep = int(model.schedule.timesteps(num_inference_steps)[0])
    arguments.check_first_step(model, timestep)
    shape = len(prompts), len(seeds)
    noise = engine.initial_noise(seeds, model.latent_shape(height, width)).to(model.device)
    latents = noise.repeat(len(prompts), 1, 1, 1)
    with model.frozen(), torch.no_grad():
        embeds = model.encode_prompt(prompts).repeat(len(seeds))
        direction = _Direction(model, embeds, None, timestep)
        start = direction.of_all(latents, budget)
    before = start.flatten(1).norm(dim=1).view(shape).cpu()
    lost = int((~before.isfinite()).any(dim=1).sum())
    if lost:
        raise ValueError(
            f"pipe: its predictions for {lost} of {len(prompts)} prompts are not finite in {model.dtype}"
        )
    if mode == "batch":
        latents = adjust_batchwise(
            model,
            latents,
            embeds,
            timestep,
            direction=start,
            max_iterations=max_iterations,
            gamma=gamma,
            rho=rho,
            batch_size=budget.rows,
            progress=progress,
        )
    elif target is not None:
        latents = adjust_per_sample(
            model,
            latents,
            embeds,
            timestep,
            target=target,
            max_iterations=max_iterations,
            lr=lr,
            weight_decay=weight_decay,
            batch_size=budget.rows,
            progress=progress,
        )
    with model.frozen(), torch.no_grad():
        after = direction.of_all(latents, budget).flatten(1).norm(dim=1).view(shape).cpu()
    return NoiseAdjustment(
        prompts=prompts,
        seeds=seeds,
        latents=latents.unflatten(0, shape).cpu(),
        before=before,
        after=after,
        converged=None if target is None else after <= target,
    )


@torch.no_grad()
def adjust_batchwise(
    model: DiffusionModel,
    latents: Tensor,
    prompt_embeds: PromptEmbeds,
    timestep: int | Tensor,
    *,
    uncond_embeds: PromptEmbeds | None = None,
    direction: Tensor | None = None,
    max_iterations: int = _ITERATIONS["batch"],
    gamma: float = 0.7,
    rho: float = RHO,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """Mode "batch" of `adjust_initial_noise` on noises that are already there, as in a running sampler.

    Args:
        latents: (R, C, h, w), of about unit variance, as the denoiser takes them.
        prompt_embeds: R prompts, or one for all.
        timestep: of all of them.
        uncond_embeds: R of them, or one for all; default those of the empty prompt.
        direction: (R, C, h, w), d at `latents`, in epsilon, where it is known already; saves the first of the
            2 evaluations that an iteration takes.
        max_iterations, gamma, rho, batch_size, progress: as in `adjust_initial_noise`.

    Returns:
        (R, C, h, w) float32 on the model's device.

    Raises:
        ValueError: for shapes that do not fit and numbers out of range.
    """
    _check_batchwise(gamma, rho, max_iterations)
    _check_shapes(latents, prompt_embeds, uncond_embeds, direction)
    budget = RowBudget(batch_size)
    ahead = rho * math.sqrt(latents[0].numel())
    with model.frozen(), tqdm(total=len(latents), unit="row", disable=not progress, desc="adjust") as bar:
        d = _Direction(model, prompt_embeds, uncond_embeds, timestep)

        def adjusted(rows: range) -> Tensor:
            x = latents[rows.start : rows.stop].to(model.device, torch.float32)
            for iteration in range(max_iterations):
                known = direction if iteration == 0 else None
                here = d(x, rows) if known is None else known[rows.start : rows.stop].to(x)
                norm = here.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
                x = x - gamma * (d(x + ahead * here / norm, rows) - here)
            return x

        return torch.cat(list(_calls(len(latents), budget, adjusted, bar.update)))


@torch.inference_mode(False)
@torch.enable_grad()
def adjust_per_sample(
    model: DiffusionModel,
    latents: Tensor,
    prompt_embeds: PromptEmbeds,
    timestep: int | Tensor,
    *,
    target: float,
    uncond_embeds: PromptEmbeds | None = None,
    max_iterations: int = _ITERATIONS["per_sample"],
    lr: float = 0.01,
    weight_decay: float = 0.01,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """Mode "per_sample" of `adjust_initial_noise` on noises that are already there; as `adjust_batchwise`."""
    check_descent(target, max_iterations, lr, weight_decay)
    _check_shapes(latents, prompt_embeds, uncond_embeds)
    budget = RowBudget(batch_size)
    with model.frozen(), tqdm(total=len(latents), unit="row", disable=not progress, desc="adjust") as bar:
        d = _Direction(model, prompt_embeds, uncond_embeds, timestep)

        def magnitude(items: list[int], values: Tensor, scale: Tensor) -> Evaluation:
            """|d| of noises and its gradient."""

            def one_call(places: range) -> Tensor:
                chosen = slice(places.start, places.stop)
                x = values[chosen].detach().requires_grad_(torch.is_grad_enabled())
                square = d(x, items[chosen]).flatten(1).square().sum(1)  # unlike the norm, smooth at 0
                norm = square.detach().sqrt()
                gradient = torch.zeros_like(x)
                if x.requires_grad and not bool((norm <= target).all()):
                    (gradient,) = torch.autograd.grad((square * scale[chosen]).sum() / 2, x)
                    gradient /= norm[:, None, None, None]
                return torch.cat((norm[:, None], gradient.flatten(1)), dim=1)

            found = torch.cat(list(_calls(len(items), budget, one_call)))
            norm, gradient = found[:, :1], found[:, 1:].reshape(values.shape)
            return Evaluation(norm[:, 0], gradient, norm)

        return descend(
            latents.to(model.device),
            magnitude,
            target=target,
            max_iterations=max_iterations,
            lr=lr,
            weight_decay=weight_decay,
            dtype=model.dtype,
            finished=bar.update,
        ).values


class _Direction:
    """d = epsilon_cond - epsilon_uncond of rows, each with its prompt; both predictions in one call."""

    def __init__(
        self,
        model: DiffusionModel,
        prompts: PromptEmbeds,
        unconditional: PromptEmbeds | None,
        timestep: int | Tensor,
    ) -> None:
        self._model, self._prompts, self._timestep = model, prompts, timestep
        self._unconditional = model.unconditional() if unconditional is None else unconditional
        self._scale = float(model.schedule.epsilon_scale(torch.as_tensor(timestep)))

    def __call__(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """(B, C, h, w) float32 at x, in which row i has the i-th of `rows`."""
        both = [
            embeds[[row if len(embeds) > 1 else 0 for row in rows]]
            for embeds in (self._unconditional, self._prompts)
        ]
        output = self._model.predict(torch.cat((x, x)), self._timestep, PromptEmbeds.cat(both))
        uncond, cond = output.to(torch.promote_types(output.dtype, torch.float32)).chunk(2)
        return (cond - uncond) * self._scale

    def of_all(self, latents: Tensor, budget: RowBudget) -> Tensor:
        """At (R, C, h, w), in as many calls as it takes."""
        calls = _calls(len(latents), budget, lambda rows: self(latents[rows.start : rows.stop], rows))
        return torch.cat(list(calls))


def _calls(
    count: int,
    budget: RowBudget,
    work: Callable[[range], Tensor],
    finished: Callable[[int], object] = lambda count: None,
) -> Iterator[Tensor]:
    """`work` on all noises, as many in a call as fit with their two rows each."""
    rest = range(count)
    while rest:
        done = budget.run(lambda rows, rest=rest: work(rest[: max(1, rows // 2)]))  # type: ignore[misc]
        yield done
        finished(len(done))
        rest = rest[len(done) :]


def _check_batchwise(gamma: float, rho: float, max_iterations: int) -> None:
    arguments.check_finite("gamma", gamma)
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"rho: got {rho}, expected a positive number, in units of sqrt(D)")
    if operator.index(max_iterations) < 1:
        raise ValueError(f"max_iterations: got {max_iterations}, expected at least 1")


def _check_shapes(
    latents: Tensor,
    prompts: PromptEmbeds,
    unconditional: PromptEmbeds | None,
    direction: Tensor | None = None,
) -> None:
    for name, embeds in (("prompt_embeds", prompts), ("uncond_embeds", unconditional)):
        if embeds is not None and len(embeds) not in (1, len(latents)):
            raise ValueError(f"{name}: got {len(embeds)} prompts, expected 1 or {len(latents)}, as latents")
    if direction is not None and direction.shape != latents.shape:
        raise ValueError(
            f"direction: got shape {tuple(direction.shape)}, expected {tuple(latents.shape)}, as latents"
        )
