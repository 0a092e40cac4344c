"""What pipelines of every family gain: norms of their guidance, and a guard against replays."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pumice import models
from pumice.models import PromptTokens
from pumice.pipelines.guard import Guard
from pumice.pipelines.watch import Watch


class Guarded:
    """Mixed into a pipeline of diffusers; `__call__` takes two arguments more.

    diffusers' own code draws the pictures: `__call__` runs it with the denoiser watched. What is not flagged
    is what diffusers draws, to the bit, and costs no further call of the denoiser. Without `track_noise_norm`
    and `guard` nothing is watched.
    """

    output: ClassVar[type[Any]]
    _watch: Watch | None = None

    def __call__(
        self, *args: Any, track_noise_norm: bool = False, guard: Guard | None = None, **kwargs: Any
    ) -> Any:
        """Draw pictures, as diffusers' pipeline of this name does with the same arguments.

        ::

            noise_norms[n, i] = |epsilon(x_t, t, prompt) - epsilon(x_t, t, negative prompt)|_2

        Args:
            *args, **kwargs: those of diffusers' pipeline.
            track_noise_norm: keep the text-conditional magnitude (Wen et al., arXiv:2407.21720) of each
                picture n at each call i of the denoiser.
            guard: flag pictures that are about to be replays, and draw them in another way.

        Returns:
            diffusers' output with `noise_norms`, (N, calls) float32, and `flagged`, (N,) bool, both on the
            CPU, None where not asked for. Of a flagged picture the first norm is the one that flagged it, the
            others are those of the mitigated trajectory. NaN stands for steps at which a callback had
            switched guidance off. With return_dict=False, diffusers' tuple and what was asked for.

        Raises:
            TypeError: if guard is something else.
            ValueError: with either argument, if guidance_scale is not above 1: there is then no unconditional
                prediction to compare with. With a guard, if the sampler's first step is pure noise (zero
                terminal SNR), or attention is to be rescaled and the call has embeddings for a prompt.
            UnsupportedModelError: with either argument, for a denoiser compiled in place; with a guard, for a
                model that its mitigation does not take; with one by embedding or initial_noise, for calls
                with IP-Adapters, cross_attention_kwargs or sizes other than the picture's own.
        """
        draw = super().__call__  # type: ignore[misc]
        if guard is None and not track_noise_norm:
            return self._extended(draw(*args, **kwargs), None, None)
        if guard is not None and not isinstance(guard, Guard):
            raise TypeError(f"guard: got a {type(guard).__name__}, expected a pumice.pipelines.Guard")
        call = inspect.signature(draw).bind(*args, **kwargs)
        call.apply_defaults()
        _check_guidance(self, call.arguments["guidance_scale"])
        prompts: tuple[PromptTokens, ...] = ()
        if guard is not None and guard.mitigation == "attention_rescaling":
            prompts = _tokens(self, call.arguments)
        if guard is not None and guard.mitigation in ("embedding", "initial_noise"):
            _check_plain_conditioning(self, call.arguments)
        watch = Watch(self, guard, track_noise_norm, prompts)
        self._watch = watch  # for `prepare_latents`
        try:
            with watch.running():
                result = draw(*args, **kwargs)
        finally:
            self._watch = None
        if guard is not None and guard.mitigation == "refuse" and watch.flagged is not None:
            _blacken(result[0], watch.flagged)
        return self._extended(result, watch.noise_norms(), watch.flagged)

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Tensor:
        """diffusers' own; what the sampler starts from is shown to the watch."""
        latents: Tensor = super().prepare_latents(*args, **kwargs)  # type: ignore[misc]
        if self._watch is not None:
            self._watch.start(latents)
        return latents

    def _extended(self, result: Any, noise_norms: Tensor | None, flagged: Tensor | None) -> Any:
        if isinstance(result, tuple):
            return (*result, *(extra for extra in (noise_norms, flagged) if extra is not None))
        found = {field.name: getattr(result, field.name) for field in fields(result)}
        return self.output(**found, noise_norms=noise_norms, flagged=flagged)


def _check_guidance(pipe: Any, guidance_scale: float) -> None:
    if not guidance_scale > 1:
        raise ValueError(
            f"guidance_scale: got {guidance_scale}, expected more than 1: noise norms and guards read the "
            "unconditional prediction, and without guidance there is none"
        )
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise models.UnsupportedModelError(
            "pipe: guidance-distilled denoisers (time_cond_proj_dim) make no unconditional prediction to read"
        )


def _check_plain_conditioning(pipe: Any, arguments: dict[str, Any]) -> None:
    """What these mitigations would not see, calling the denoiser themselves, and so optimise past."""
    sizes = ("original_size", "target_size")  # of Stable Diffusion XL
    given = [
        name
        for name in ("cross_attention_kwargs", "ip_adapter_image", "ip_adapter_image_embeds")
        if arguments.get(name)
    ]
    model = models.load(pipe)
    _, *sides = model.latent_shape(arguments.get("height"), arguments.get("width"))
    picture = tuple(side * model.vae_scale_factor for side in sides)
    given += [name for name in sizes if tuple(arguments.get(name) or picture) != picture]
    given += ["crops_coords_top_left"] if any(arguments.get("crops_coords_top_left") or ()) else []
    if given:
        raise models.UnsupportedModelError(
            f"{given[0]}: guards by embedding or initial_noise do not take it into account; "
            "leave it out or choose another mitigation"
        )


def _tokens(pipe: Any, arguments: dict[str, Any]) -> tuple[PromptTokens, ...]:
    """Of each prompt; of two for two text encoders, the longer one, as their embeddings lie side by side."""
    model = models.load(pipe)
    prompts = [
        model.tokenize(arguments[name]) for name in ("prompt", "prompt_2") if arguments.get(name) is not None
    ]
    if arguments["prompt"] is None:
        raise ValueError(
            "prompt: got none, expected one: attention rescaling has to know where a prompt ends, "
            "which embeddings do not tell"
        )
    return tuple(max(both, key=lambda tokens: tokens.eos) for both in zip(*prompts, strict=True))


def _blacken(images: list[Image.Image] | NDArray[np.floating] | Tensor, flagged: Tensor) -> None:
    for index in flagged.nonzero().flatten().tolist():
        if isinstance(images, list):
            images[index] = Image.new(images[index].mode, images[index].size)
        else:
            images[index] = 0
