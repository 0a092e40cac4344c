"""What a guard does about flagged pictures: one function a mitigation, called inside the first step.

Each takes that step and the flagged samples. It returns the step as the sampler shall see it, and what is to
be made of every step from there on: a function from a step to the conditional predictions that guidance uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pumice import models
from pumice.memorization.attention_rescaling import rescaled_attention
from pumice.memorization.dynamic_guidance import Transition, with_guidance_scale
from pumice.memorization.initial_noise import UNGUIDED_ABOVE, adjust_batchwise
from pumice.memorization.mitigate import optimize_embeds
from pumice.models import PromptEmbeds, PromptTokens
from pumice.pipelines.guard import Guard
from pumice.pipelines.step import Step

Conditional = Callable[[Step], Tensor]


@dataclass(frozen=True, eq=False)
class Flagged:
    """The flagged samples of a running call.

    Attributes:
        rows: (N,) bool, on the denoiser's device.
        on_host: the same on the CPU.
        guard: that flagged them.
        pipe: that is running.
        prompts: of the call, where the mitigation has to know them.
        latents: (N, C, h, w), the tensor that the sampler starts from, in the scheduler's units.
        hooks: what it holds is undone when the call ends.
    """

    rows: Tensor
    on_host: Tensor
    guard: Guard
    pipe: Any
    prompts: tuple[PromptTokens, ...]
    latents: Tensor
    hooks: ExitStack

    @property
    def indices(self) -> list[int]:
        return self.on_host.nonzero().flatten().tolist()


def dynamic_guidance(step: Step, flagged: Flagged) -> tuple[Step, Conditional]:
    transition, guard = Transition(), flagged.guard

    def conditional(step: Step) -> Tensor:
        due = guard.latest_timestep is not None and step.timestep < guard.latest_timestep
        withheld = flagged.rows & ~transition.update(step.magnitude, due=due)
        return with_guidance_scale(step.cond, step.uncond, withheld, step.guidance_scale, guard.early_scale)

    return step, conditional


def initial_noise(step: Step, flagged: Flagged) -> tuple[Step, Conditional]:
    rows = flagged.indices
    adjusted = step.latents.clone()
    adjusted[rows] = adjust_batchwise(
        models.load(flagged.pipe),
        step.latents[rows],
        _embeds(step, [row - len(adjusted) for row in rows]),
        _whole(step.timestep),
        uncond_embeds=_embeds(step, rows),
        direction=step.direction[rows],
    ).to(adjusted.dtype)
    # the scheduler's units are a multiple of the denoiser's; it reads its latents after this call
    units = flagged.latents.float().norm() / step.latents.float().norm()
    flagged.latents.add_((adjusted - step.latents) * units)
    first = step.again(flagged.rows, latents=adjusted)

    def conditional(step: Step) -> Tensor:
        unguided = flagged.rows & (step.timestep > UNGUIDED_ABOVE)
        return with_guidance_scale(step.cond, step.uncond, unguided, step.guidance_scale, 0.0)

    return first, conditional


def embedding(step: Step, flagged: Flagged) -> tuple[Step, Conditional]:
    guard, rows = flagged.guard, flagged.indices
    cond = [row - len(step.latents) for row in rows]  # from the end: guidance may be off at a later step
    found = optimize_embeds(
        models.load(flagged.pipe),
        _embeds(step, cond),
        step.latents[rows, None],
        step.uncond[rows, None],
        _whole(step.timestep),
        target=guard.threshold if guard.target is None else guard.target,
    )

    def mitigated(embeds: Tensor) -> Tensor:
        embeds = embeds.clone()
        embeds[cond] = found.prompt_embeds.embeds.to(embeds.dtype)
        return embeds

    def swap(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"encoder_hidden_states": mitigated(kwargs["encoder_hidden_states"])}

    hook = step.unet.register_forward_pre_hook(swap, with_kwargs=True)
    flagged.hooks.callback(hook.remove)
    return step.again(flagged.rows, embeds=mitigated(step.embeds)), _as_it_is


def attention_rescaling(step: Step, flagged: Flagged) -> tuple[Step, Conditional]:
    images = len(step.latents) // len(flagged.prompts)
    tokens = [prompt for prompt in flagged.prompts for _ in range(images)]
    rescaling = rescaled_attention(models.load(flagged.pipe), tokens, rows=flagged.on_host)
    flagged.hooks.enter_context(rescaling)
    return step.again(flagged.rows), _as_it_is


def refuse(step: Step, flagged: Flagged) -> tuple[Step, Conditional]:
    if flagged.on_host.all():
        flagged.pipe._interrupt = True  # diffusers' way to skip all further steps
    return step, _as_it_is


RESPONSES: Mapping[str, Callable[[Step, Flagged], tuple[Step, Conditional]]] = {
    "dynamic_guidance": dynamic_guidance,
    "initial_noise": initial_noise,
    "embedding": embedding,
    "attention_rescaling": attention_rescaling,
    "refuse": refuse,
}


def _as_it_is(step: Step) -> Tensor:
    return step.cond


def _whole(timestep: Tensor) -> Tensor:
    """Some samplers step between the timesteps of the model's schedule."""
    return timestep.round().long()


def _embeds(step: Step, rows: list[int]) -> PromptEmbeds:
    """The embeddings of these of the 2N rows; what the tokens were is not known, nor needed."""
    embeds = step.embeds[rows]
    length = embeds.shape[1]
    tokens = PromptTokens("", (), 0, range(1, length - 1), length - 1, range(0), (), "")
    pooled = (step.kwargs.get("added_cond_kwargs") or {}).get("text_embeds")
    return PromptEmbeds(embeds, None if pooled is None else pooled[rows], (tokens,) * len(rows))
