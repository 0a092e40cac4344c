"""Fine-tuning that does not memorize: pairs that pull too hard are left out (Wen et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models, ops
from pumice.memorization.arguments import checked_prompts, checked_seeds
from pumice.memorization.engine import Screen
from pumice.memorization.magnitude import Magnitude
from pumice.memorization.threshold import threshold_at
from pumice.models import NoiseSchedule

_A_BLOCK = 64  # captions encoded together, and in memory together

Threshold = float | Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FilteredBatch:
    """Which pairs of a training batch may be learned.

    Attributes:
        keep: (B,) bool.
        magnitudes: (B,) float32, |epsilon_cond - epsilon_uncond| of each pair at its timestep.
    """

    keep: Tensor
    magnitudes: Tensor

    @property
    def empty(self) -> bool:
        """Whether no pair is kept; waits for the device.

        It tells of this process alone: one that leaves its backward out would let the others wait forever.
        """
        return not bool(self.keep.any())

    def mean(self, losses: Tensor) -> Tensor:
        """The mean over the kept pairs; where there is none, a zero whose gradient is zero everywhere.

        ::

            sum over kept b of mean(losses[b]) / max(number kept, 1)

        The graph reaches all weights whatever is kept, so every process of a distributed run takes part in
        every backward. Each averages over its own kept pairs.

        Args:
            losses: (B, ...) unreduced, weighted or not (Min-SNR); all B pairs of the batch.

        Raises:
            ValueError: for another first dimension.
        """
        if losses.shape[:1] != self.keep.shape:
            raise ValueError(
                f"losses: got shape {tuple(losses.shape)}, expected ({len(self.keep)}, ...), "
                'one a pair: reduction="none"'
            )
        each = losses.reshape(len(losses), -1).mean(1) if losses.numel() else losses.flatten()
        return torch.where(self.keep, each, 0).sum() / self.keep.sum().clamp(min=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {"keep": self.keep.tolist(), "magnitudes": self.magnitudes.tolist()}


def filter_batch(
    denoiser: Callable[..., Any],
    noisy_latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    uncond_embeds: Tensor,
    threshold: Threshold,
    *,
    schedule: NoiseSchedule,
    prediction: Tensor | None = None,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
    uncond_pooled: Tensor | None = None,
) -> FilteredBatch:
    """Find the pairs of a training batch that the model has begun to memorize, to leave them out of the loss.

    ::

        m[b] = |epsilon(x_t, t, prompt b) - epsilon(x_t, t, "")|_2    over (C, h, w), at the pair's own x_t, t
        keep[b] = m[b] < threshold(t_b)

    (Wen et al., arXiv:2407.21720.) One forward more a batch, without gradient. In a training loop of
    diffusers::

        uncond = models.load(pipe).unconditional()  # once: constant while the text encoder is
        threshold = threshold_table(pipe, fresh_captions)
        ...
        filtered = filter_batch(unet, noisy_latents, timesteps, prompt_embeds, uncond.embeds, threshold,
                                schedule=schedule, prediction=prediction)
        loss = filtered.mean(F.mse_loss(prediction.float(), target.float(), reduction="none"))
        accelerator.backward(loss)

    It sees what a caption brings back. A picture that the unconditional prediction has learned as well, from
    captions dropped in training or because all weights are trained, makes less of a difference.

    Args:
        denoiser: as the loop calls it, wrapped for distributed training or not: takes noisy latents,
            timesteps and prompt embeddings; returns the prediction, or it as the first of several outputs.
        noisy_latents: (B, C, h, w), any float dtype; norms are in float32.
        timesteps: (B,) integers.
        prompt_embeds: (B, L, D).
        uncond_embeds: (1, L, D), or one a pair, of the empty prompt.
        threshold: a number (the paper's code has 2, for Stable Diffusion 1); better, as |d| depends on t, one
            for each timestep: (T,), as `threshold_table` makes it, on the denoiser's device; or a callable
            that takes `timesteps` and returns (B,).
        schedule: `NoiseSchedule.from_config(scheduler.config)` of the scheduler that the loop adds noise by.
        prediction: the loop's own for `prompt_embeds`; computed, without gradient, if it is None.
        added_cond_kwargs: of the denoiser, Stable Diffusion XL's `text_embeds` and `time_ids`.
        uncond_pooled: (1, P), or one a pair: takes the place of `text_embeds` in the unconditional call.

    Returns:
        A `FilteredBatch`.

    Differences from the released code: thresholds may depend on t; v-predictions are converted to epsilon;
    norms are in float32; the empty prompt is not encoded again at every step. A batch of which nothing is
    kept gives a loss of zero instead of no backward and no optimizer step, so processes never wait for each
    other; an optimizer with momentum or weight decay still moves then. A magnitude that is NaN is kept: the
    loss shows what went wrong.

    Raises:
        TypeError: if timesteps are not integers.
        ValueError: for shapes that do not fit, a threshold that is not positive or has another length, or one
            of `added_cond_kwargs["text_embeds"]` and `uncond_pooled` without the other.
    """
    batch = len(noisy_latents)
    if timesteps.shape != (batch,):
        raise ValueError(f"timesteps: got shape {tuple(timesteps.shape)}, expected ({batch},), one a pair")
    if uncond_embeds.ndim != 3 or len(uncond_embeds) not in (1, batch):
        raise ValueError(
            f"uncond_embeds: got shape {tuple(uncond_embeds.shape)}, expected (1, L, D) or ({batch}, L, D)"
        )
    conditioning: dict[str, Any] = {}
    unconditional: dict[str, Any] = {}
    if added_cond_kwargs is not None:
        conditioning["added_cond_kwargs"] = dict(added_cond_kwargs)
        unconditional["added_cond_kwargs"] = dict(added_cond_kwargs)
    if (uncond_pooled is None) != ("text_embeds" not in (added_cond_kwargs or {})):
        raise ValueError(
            f"uncond_pooled: got {'none' if uncond_pooled is None else 'one'}, expected it together with "
            'added_cond_kwargs["text_embeds"], whose place it takes'
        )
    if uncond_pooled is not None:
        unconditional["added_cond_kwargs"]["text_embeds"] = uncond_pooled.expand(batch, -1)

    with torch.no_grad():
        limits = _limits(threshold, timesteps, schedule)
        scale = schedule.epsilon_scale(timesteps)
        if prediction is None:
            prediction = _first(denoiser(noisy_latents, timesteps, prompt_embeds, **conditioning))
        uncond = _first(
            denoiser(noisy_latents, timesteps, uncond_embeds.expand(batch, -1, -1), **unconditional)
        )
        if prediction.shape != uncond.shape:
            raise ValueError(
                f"prediction: got shape {tuple(prediction.shape)}, expected {tuple(uncond.shape)}, "
                "as the denoiser's"
            )
        difference = ops.guidance_magnitude(prediction.detach().float(), uncond.float()).difference
        magnitudes = (difference * scale.to(difference.device)).float()
        keep = ~(magnitudes >= limits.to(magnitudes.device))
    # In older versions of torch the weights that autocast has cast here keep no graph; the loop's own forward
    # would find them and learn nothing.
    torch.clear_autocast_cache()
    return FilteredBatch(keep, magnitudes)


@torch.no_grad()
def threshold_table(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    fpr: float = 0.05,
    seeds: int | Sequence[int] = 4,
    num_inference_steps: int = 50,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """The threshold of every timestep that a share `fpr` of pairs known not to be memorized exceeds there.

    ::

        m[p, s, t] as in `detect`, along samples drawn without guidance (guidance_scale = 1)
        table[t] = threshold_at(fpr, m[:, :, t])    at the sampler's timesteps, linear between them,
                                                    constant before the first and after the last

    In training x_t is a picture of the caption with noise, and so are, as far as the model knows, the states
    of its own samples, but not guided ones: there magnitudes are half as large in the middle of the schedule.

    Args:
        pipe: the model before fine-tuning: a diffusers pipeline, a path, a hub id, or a DiffusionModel.
        prompts: captions like those to be trained on, none of them memorized; a hundred or more.
        fpr: the share of pairs that may be lost at each timestep, [0, 1).
        seeds, num_inference_steps, batch_size, progress: as in `detect`.

    Returns:
        (T,) float32 on the CPU, T the model's number of training timesteps.

    Raises:
        TypeError: if a prompt is not a string, or seeds are not integers.
        ValueError: if there are no prompts or no seeds, for numbers out of range, for a model whose first
            step is pure noise (zero terminal SNR), or whose predictions are not finite.
        UnsupportedModelError: if the model's family is not supported.
    """
    prompts, seeds = checked_prompts(prompts), checked_seeds(seeds)
    threshold_at(fpr, torch.zeros(1))  # raises before the work, not after it
    model = models.load(pipe)
    with model.frozen(), tqdm(total=len(prompts) * len(seeds), unit="row", disable=not progress) as bar:
        screen = Screen(
            model, seeds, num_inference_steps=num_inference_steps, guidance_scale=1.0, batch_size=batch_size
        )
        metric = Magnitude(steps=None)
        metric.columns(screen)  # raises what does not fit
        blocks = [prompts[first : first + _A_BLOCK] for first in range(0, len(prompts), _A_BLOCK)]
        found = torch.cat(
            [
                screen.measure(metric.measure, model.encode_prompt(block), range(len(seeds)), bar.update)
                for block in blocks
            ]
        )
    if not bool(found.isfinite().all()):
        raise ValueError(f"pipe: its predictions are not finite in {model.dtype}")
    limits = [threshold_at(fpr, at_t) for at_t in found.flatten(0, 1).unbind(1)]
    every = np.arange(model.schedule.num_train_timesteps)
    # numpy wants them ascending, samplers descend
    return torch.from_numpy(np.interp(every, screen.sampler.timesteps.flip(0), limits[::-1])).float()


def _first(output: Any) -> Tensor:
    """The prediction itself, or the first of a tuple's or a diffusers output's fields."""
    prediction: Tensor = output if isinstance(output, Tensor) else output[0]
    return prediction


def _limits(threshold: Threshold, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The threshold of each pair, (B,)."""
    if isinstance(threshold, Tensor):
        if threshold.shape != (schedule.num_train_timesteps,):
            raise ValueError(
                f"threshold: got shape {tuple(threshold.shape)}, "
                f"expected ({schedule.num_train_timesteps},), one for each timestep"
            )
        return threshold.to(timesteps.device)[timesteps]
    if callable(threshold):
        limits = threshold(timesteps)
        if limits.shape != timesteps.shape:
            raise ValueError(
                f"threshold: returned shape {tuple(limits.shape)}, expected {tuple(timesteps.shape)}"
            )
        return limits
    if not threshold > 0:
        raise ValueError(f"threshold: got {threshold}, expected a positive number")
    return torch.full(timesteps.shape, float(threshold), device=timesteps.device)
