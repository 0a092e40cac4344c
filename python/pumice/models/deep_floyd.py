"""The second stage of DeepFloyd IF as a denoiser of pixels: it is told a text and shown a small picture."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .errors import UnsupportedModelError
from .freezing import frozen
from .loading import one_line_errors
from .pixel import Denoised, PixelDenoiser
from .schedule import NoiseSchedule

FACTOR = 4
_PIPELINE = "IFSuperResolutionPipeline"


def is_deep_floyd(source: Any) -> bool:
    """Whether it is such a pipeline, or the path of one."""
    if isinstance(source, str | PathLike):
        return (Path(source) / "model_index.json").is_file() and _class_name(Path(source)) == _PIPELINE
    return _PIPELINE in (kind.__name__ for kind in type(source).__mro__)


class DeepFloyd(PixelDenoiser):
    """A denoiser of pictures (B, 3, h, w) in [-1, 1], guided by a text.

    ::

        epsilon = epsilon(x, small, "") + guidance_scale (epsilon(x, small, prompt) - epsilon(x, small, ""))

    The variance is that of the prompt's branch. x0 is clipped to [-1, 1], where the pipeline cuts it at a
    quantile. `see` comes before the first call.

    Args:
        source: an `IFSuperResolutionPipeline` with its text encoder, or the path of one.
        prompt: encoded once.
        guidance_scale: one branch where it is at most 1 or the prompt is empty.
        noise_level: of the small pictures, a timestep of their own schedule.
    """

    def __init__(self, source: Any, *, prompt: str, guidance_scale: float, noise_level: int) -> None:
        pipe = open_deep_floyd(Path(source)) if isinstance(source, str | PathLike) else source
        super().__init__(pipe.unet, pipe.scheduler)
        if pipe.text_encoder is None or pipe.tokenizer is None:
            raise UnsupportedModelError(
                "denoiser: its pipeline has no text encoder, expected one for the prompt"
            )
        steps = pipe.image_noising_scheduler.config.num_train_timesteps
        if not 0 <= noise_level < steps:
            raise ValueError(
                f"noise_level: got {noise_level}, expected 0 to {steps - 1}, the model's schedule"
            )
        guided = guidance_scale > 1 and prompt != ""
        with frozen([pipe.text_encoder]), torch.no_grad():
            texts = pipe.encode_prompt(prompt, guided, device=self.device)
        # in the order of the batch: away from no text, to the prompt
        self._texts = torch.cat([text for text in reversed(texts) if text is not None]).to(self.dtype)
        self._scale, self._level = guidance_scale, noise_level
        self._noises = NoiseSchedule.from_config(pipe.image_noising_scheduler.config)
        self._seen: dict[torch.Size, Tensor] = {}

    def see(self, pictures: Tensor, noise: Tensor) -> None:
        """The pictures (B, 3, h, w) in [-1, 1] that the next calls are about, and standard normal noise.

        What the network sees is a fourth of their sides, made large again, and noised.
        """
        sides = [side // FACTOR for side in pictures.shape[2:]]
        small = interpolate(pictures, sides, mode="bicubic", antialias=True).clamp(-1, 1)
        large = interpolate(small, pictures.shape[2:], mode="bilinear", align_corners=True)
        seen = self._noises.add_noise(large, noise, self._level)
        # in place: a captured graph reads it where it lies
        self._seen.setdefault(seen.shape, torch.empty_like(seen)).copy_(seen)

    def __call__(self, x: Tensor, timestep: Tensor) -> Denoised:
        """As of `PixelDenoiser`, of the pictures that it was last shown in this shape."""
        branches = len(self._texts)
        pair = torch.cat((x, self._seen[x.shape]), dim=1).to(self.dtype)
        output = self.unet(
            pair.repeat(branches, 1, 1, 1),
            timestep,
            encoder_hidden_states=self._texts.repeat_interleave(len(x), dim=0),
            class_labels=torch.full((branches * len(x),), self._level, device=x.device),
            return_dict=False,
        )[0].to(x.dtype)
        epsilon, learned = output.chunk(2, dim=1)
        if branches == 2:
            (away, to), learned = epsilon.chunk(2), learned.chunk(2)[1]
            epsilon = away + self._scale * (to - away)
        return self._denoised(epsilon, learned, x, timestep)

    def _check(self, unet: Any) -> None:
        config = unet.config
        if (config.in_channels, config.out_channels) != (6, 6):
            raise UnsupportedModelError(
                f"denoiser: takes {config.in_channels} channels and gives {config.out_channels}, expected 6 "
                "and 6, those of the second stage of DeepFloyd IF"
            )


def _class_name(path: Path) -> Any:
    import diffusers

    with one_line_errors(path, "denoiser"):
        return diffusers.DiffusionPipeline.load_config(path).get("_class_name")


def open_deep_floyd(path: Path) -> Any:
    """The pipeline of a diffusers folder, float32 on the CPU."""
    import diffusers

    with one_line_errors(path, "denoiser"):
        return diffusers.IFSuperResolutionPipeline.from_pretrained(
            path, use_safetensors=True, safety_checker=None, requires_safety_checker=False
        )
