"""Embeddings that no longer replay a picture: prompt-embedding optimisation (Wen et al., ICLR 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice.memorization import arguments, engine
from pumice.memorization.descent import Evaluation, check_descent, descend
from pumice.models import DiffusionModel, PromptEmbeds, RowBudget

Variant = Literal["wen"]


@dataclass(frozen=True, eq=False)
class Mitigation:
    """Optimised embeddings of P prompts, and what they did to the magnitudes from S initial noises.

    `pipe(prompt_embeds=found.prompt_embeds.embeds, negative_prompt_embeds=...)` draws from them; a model of
    the XL family takes `pooled_prompt_embeds=found.prompt_embeds.pooled` too.

    Attributes:
        prompt_embeds: of the P prompts, in the text encoder's dtype.
        target: that L was to reach.
        before, after: (P, S) float32, |epsilon_cond - epsilon_uncond| with the prompts' own embeddings, and
            with `prompt_embeds`.
        trace: L of each prompt at its start and after each of its steps.
        converged: (P,) bool, whether L got to the target.
        iterations: (P,) int64, the steps of each prompt, skipped ones included; 0 for a harmless prompt.
        skipped: (P,) int64, those not taken because the gradient was not finite.
    """

    prompt_embeds: PromptEmbeds
    target: float
    before: Tensor
    after: Tensor
    trace: tuple[tuple[float, ...], ...]
    converged: Tensor
    iterations: Tensor
    skipped: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; the embeddings themselves are left out."""
        return {
            "prompts": [tokens.prompt for tokens in self.prompt_embeds.tokens],
            "target": self.target,
            "before": self.before.tolist(),
            "after": self.after.tolist(),
            "trace": [list(losses) for losses in self.trace],
            "converged": self.converged.tolist(),
            "iterations": self.iterations.tolist(),
            "skipped": self.skipped.tolist(),
        }


def mitigate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    target: float,
    seeds: int | Sequence[int] = 1,
    max_iterations: int = 10,
    lr: float = 0.1,
    weight_decay: float = 0.01,
    num_inference_steps: int = 50,
    variant: Variant | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Mitigation:
    """Change the embeddings of memorized prompts until they pull the first step no more than others do.

    ::

        n[p, s] = |epsilon(x_T, t, e_p) - epsilon(x_T, t, "")|_2    x_T the noise of seed s, t the first step
        L[p]    = sqrt(mean of n[p, s]^2 over s)
        e_p    <- AdamW(e_p, gradient of L[p])    until L[p] <= target, at most max_iterations times

    (Wen et al., arXiv:2407.21720.) All prompts go in one batch, each with an optimiser state of its own; one
    that has reached the target stays as it is. The state is float32 whatever the model's dtype, the embedding
    of BOS is constant, and so is a pooled embedding. A prompt that does not reach the target within
    `max_iterations` steps gets the embedding with its smallest L.

    Draw the pictures from the same noises, `generator=torch.Generator().manual_seed(seed)` each, and pass the
    negative embedding with the optimised one.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel.
        prompts: one or more.
        target: L to get down to, a magnitude per sample in epsilon; what fresh prompts have. The paper's 1
            to 5 and the released code's 3 are norms over a batch of 4 pictures, twice as large.
        seeds: of the initial noises: how many (0, 1, 2, ...), or which; the same ones for every prompt.
        max_iterations: most steps. Default 10, the released code's.
        lr: AdamW's learning rate; its first step moves every coordinate by this. Default 0.1, that of the
            released function; with the 0.05 of its scripts ten steps often do not reach the target.
        weight_decay: AdamW's. Default 0.01, the released code's.
        num_inference_steps: of the DDIM sampler whose first timestep is taken. Default 50, the paper's.
        variant: None, or "wen" for what the released code does: L and the target are norms over all pictures
            of a prompt, sqrt(sum of n^2); weight decay shrinks the embedding of BOS too; the last embedding
            is returned, and one reached by the last step is not called converged.
        height, width: of the pictures, in px; default the model's own.
        batch_size: rows (prompts times seeds) in one call of the denoiser; halved on out-of-memory.
        progress: show a bar.

    Returns:
        A `Mitigation`.

    Differences from the released code, in either variant: weights are frozen, the unconditional prediction is
    computed once and without gradient; the state is float32; non-finite gradients are skipped; v-predictions
    are converted to epsilon.

    Raises:
        TypeError: if a prompt is not a string, or seeds or max_iterations are not integers.
        ValueError: if there are no prompts or no seeds, for numbers out of range and unknown variants, and
            for a model whose first step is pure noise (zero terminal SNR), or whose predictions are not
            finite.
        UnsupportedModelError: if the model's family is not supported.
    """
    prompts = arguments.checked_prompts(prompts)
    seeds = arguments.checked_seeds(seeds)
    _check(target, max_iterations, lr, weight_decay, variant)
    budget = RowBudget(batch_size)
    model = models.load(pipe)
    timestep = int(model.schedule.timesteps(num_inference_steps)[0])
    arguments.check_first_step(model, timestep)
    noise = engine.initial_noise(seeds, model.latent_shape(height, width)).to(model.device)
    with model.frozen(), torch.no_grad():
        embeds, empty = model.encode_prompt(prompts), model.unconditional()
        uncond = budget.run(
            lambda rows: torch.cat([model.predict(part, timestep, empty) for part in noise.split(rows)])
        )
    found = optimize_embeds(
        model,
        embeds,
        noise.expand(len(prompts), *noise.shape),
        uncond.expand(len(prompts), *uncond.shape),
        timestep,
        target=target,
        max_iterations=max_iterations,
        lr=lr,
        weight_decay=weight_decay,
        variant=variant,
        batch_size=budget.rows,
        progress=progress,
    )
    lost = int((~found.before.isfinite()).any(dim=1).sum())
    if lost:
        raise ValueError(
            f"pipe: its predictions for {lost} of {len(prompts)} prompts are not finite in {model.dtype}"
        )
    return found


@torch.inference_mode(False)
@torch.enable_grad()
def optimize_embeds(
    model: DiffusionModel,
    prompt_embeds: PromptEmbeds,
    latents: Tensor,
    uncond: Tensor,
    timestep: int | Tensor,
    *,
    target: float,
    max_iterations: int = 10,
    lr: float = 0.1,
    weight_decay: float = 0.01,
    variant: Variant | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Mitigation:
    """`mitigate` from noises and unconditional predictions that are already there, as in a running sampler.

    Args:
        prompt_embeds: of P prompts.
        latents: (P, S, C, h, w), the S noises of each prompt, as the denoiser takes them.
        uncond: (P, S, C, h, w), the denoiser's raw output for them without prompt.
        timestep: of all of them.
        target, max_iterations, lr, weight_decay, variant, batch_size, progress: as in `mitigate`.

    Raises:
        ValueError: for shapes that do not fit, numbers out of range, unknown variants.
    """
    if latents.ndim != 5 or len(latents) != len(prompt_embeds):
        raise ValueError(
            f"latents: got shape {tuple(latents.shape)}, expected ({len(prompt_embeds)}, S, C, h, w)"
        )
    if uncond.shape != latents.shape:
        raise ValueError(
            f"uncond: got shape {tuple(uncond.shape)}, expected {tuple(latents.shape)}, as latents"
        )
    _check(target, max_iterations, lr, weight_decay, variant)
    wen = variant == "wen"
    count, budget = len(prompt_embeds), RowBudget(batch_size)
    objective = _Objective(model, prompt_embeds, latents, uncond, timestep, target, wen, budget)
    with model.frozen(), tqdm(total=count, unit="prompt", disable=not progress, desc="mitigate") as bar:
        found = descend(
            objective.start,
            objective,
            target=target,
            max_iterations=max_iterations,
            lr=lr,
            weight_decay=weight_decay,
            dtype=model.dtype,
            unchecked_end=wen,
            finished=bar.update,
        )
    return Mitigation(
        prompt_embeds=dataclasses.replace(
            prompt_embeds, embeds=objective.embeds(range(count), found.values).to(prompt_embeds.embeds.dtype)
        ),
        target=target,
        before=found.before,
        after=found.after,
        trace=found.trace,
        converged=found.converged,
        iterations=torch.tensor([len(losses) - 1 for losses in found.trace]),
        skipped=found.skipped,
    )


def _check(
    target: float, max_iterations: int, lr: float, weight_decay: float, variant: Variant | None
) -> None:
    check_descent(target, max_iterations, lr, weight_decay)
    if variant not in (None, "wen"):
        raise ValueError(f"variant: got {variant!r}, expected None or 'wen'")


class _Objective:
    """L of prompts and its gradient by their embeddings, without the row of BOS unless that decays too."""

    def __init__(
        self,
        model: DiffusionModel,
        prompts: PromptEmbeds,
        latents: Tensor,
        uncond: Tensor,
        timestep: int | Tensor,
        target: float,
        wen: bool,
        budget: RowBudget,
    ) -> None:
        self._model, self._prompts, self._budget = model, prompts, budget
        self._target, self._wen, self._timestep = target, wen, timestep
        self._dtype = torch.promote_types(model.dtype, torch.float32)
        # copies, because autograd saves nothing that was made in inference mode
        self._latents, self._uncond, embeds = (
            x.detach().to(model.device, self._dtype, copy=True) for x in (latents, uncond, prompts.embeds)
        )
        self._scale = model.schedule.epsilon_scale(torch.as_tensor(timestep)).to(model.device, self._dtype)
        self._pictures = 1 if wen else latents.shape[1]  # that L is the mean of
        self._constant, self.start = embeds.split(
            [0, embeds.shape[1]] if wen else [1, embeds.shape[1] - 1], 1
        )

    def embeds(self, prompts: Sequence[int], values: Tensor) -> Tensor:
        """(A, L, D)."""
        return torch.cat((self._constant[list(prompts)], values), dim=1)

    def __call__(self, prompts: list[int], values: Tensor, scale: Tensor) -> Evaluation:
        return self._budget.run(lambda rows: self._evaluate(prompts, values, scale, rows))

    def _evaluate(self, prompts: list[int], values: Tensor, scale: Tensor, rows: int) -> Evaluation:
        together = max(1, rows // self._latents.shape[1])
        places = torch.arange(len(prompts)).split(together)
        parts = [
            self._of_group([prompts[place] for place in group.tolist()], values[group], scale[group], rows)
            for group in places
        ]
        return Evaluation(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _of_group(self, prompts: list[int], values: Tensor, scale: Tensor, rows: int) -> Evaluation:
        """Of as many prompts as go into one call; or of one prompt, whose seeds may need several."""
        seeds = self._latents.shape[1]
        latents, uncond = (x[prompts].flatten(0, 1) for x in (self._latents, self._uncond))
        leaf = values.detach().requires_grad_(torch.is_grad_enabled())
        squares, gradient = latents.new_empty(0), torch.zeros_like(values)
        for call in torch.arange(len(latents)).split(rows):
            prompt = call // seeds
            embeds = dataclasses.replace(self._prompts[prompts], embeds=self.embeds(prompts, leaf))
            cond = self._model.predict(latents[call], self._timestep, embeds[prompt.tolist()]).to(self._dtype)
            # squares, which add up over calls, and have a gradient at 0
            square = ((cond - uncond[call]) * self._scale).flatten(1).square().sum(1)
            squares = torch.cat((squares, square.detach()))
            complete = len(squares) == len(latents)
            if leaf.requires_grad and not (complete and bool((self._loss(squares) <= self._target).all())):
                half = (square * scale[prompt]).sum() / (2 * self._pictures)
                gradient += torch.autograd.grad(half, leaf)[0]
        if self._wen:
            gradient[:, 0] = 0
        loss = self._loss(squares)
        return Evaluation(loss, gradient / loss[:, None, None], squares.sqrt().unflatten(0, (-1, seeds)))

    def _loss(self, squares: Tensor) -> Tensor:
        return (squares.unflatten(0, (-1, self._latents.shape[1])).sum(1) / self._pictures).sqrt()
