"""Stable Diffusion's upscaler: pictures of four times the sides, each with random numbers of its own."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .freezing import frozen
from .loading import check_device, one_line_errors

FACTOR = 4
_PIPELINE = "StableDiffusionUpscalePipeline"


def load_upscaler(
    source: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Open a `StableDiffusionUpscalePipeline`, such as stabilityai/stable-diffusion-x4-upscaler.

    Args:
        source: the pipeline, which is returned, or the path of its diffusers folder.
        dtype, device: for a path; default float32 on the CPU.

    Raises:
        UnsupportedModelError: for a pipeline of another kind, or one that does not make four times the sides.
        TypeError: if source is none of the above.
        ValueError: if a path is not a model or cannot be read, nothing can run on the device, or dtype or
            device are given with a loaded pipeline.
    """
    if isinstance(source, str | PathLike):
        check_device(device)
        pipe = _opened(Path(source)).to(device=device, dtype=dtype or torch.float32)
    elif dtype is not None or device is not None:
        raise ValueError("dtype, device: got one with a loaded pipeline, expected a path; use pipe.to")
    else:
        pipe = source
    if not hasattr(pipe, "components"):
        raise TypeError(f"upscaler: got a {type(pipe).__name__}, expected a {_PIPELINE} or a path")
    if _PIPELINE not in (kind.__name__ for kind in type(pipe).__mro__):
        raise UnsupportedModelError(f"upscaler: got a {type(pipe).__name__}, expected a {_PIPELINE}")
    channels = pipe.vae.config.latent_channels + 3
    if pipe.vae_scale_factor != FACTOR or pipe.unet.config.in_channels != channels:
        raise UnsupportedModelError(
            f"upscaler: it makes {pipe.vae_scale_factor} times the sides by a denoiser of "
            f"{pipe.unet.config.in_channels} channels, expected {FACTOR} and {channels}"
        )
    return pipe


def _opened(path: Path) -> Any:
    import diffusers

    if not (path / "model_index.json").is_file():
        raise ValueError(f"upscaler: {str(path)!r} is not a diffusers folder")
    with one_line_errors(path, "upscaler"):
        name = diffusers.DiffusionPipeline.load_config(path).get("_class_name")
    if name != _PIPELINE:
        raise UnsupportedModelError(f"upscaler: {str(path)!r} is a {name}, expected a {_PIPELINE}")
    with one_line_errors(path, "upscaler"):
        return diffusers.StableDiffusionUpscalePipeline.from_pretrained(path, use_safetensors=True)


class Upscaler:
    """A pipeline that is called batch by batch, and stays as it is.

    Args:
        pipe: of `load_upscaler`.

    Attributes:
        device: where it runs.
        multiple: what sides of small pictures must be multiples of.
        max_noise_level: the largest `noise_level` that it knows.
        max_steps: the most `num_inference_steps` of its scheduler.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.device = torch.device(pipe._execution_device)
        # diffusers resizes small pictures to multiples of the autoencoder's factor unasked
        self.multiple = math.lcm(FACTOR, 2 ** (len(pipe.unet.config.block_out_channels) - 1))
        self.max_noise_level = int(pipe.config.max_noise_level)
        self.max_steps = int(pipe.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """(1, tokens, width)."""
        with self._borrowed() as pipe:
            return cast(Tensor, pipe.encode_prompt(prompt, self.device, 1, False)[0])

    def __call__(
        self,
        images: Tensor,
        embeds: Tensor,
        negative_embeds: Tensor | None,
        seeds: Sequence[int],
        **settings: Any,
    ) -> Tensor:
        """What the pipeline makes of small pictures.

        Args:
            images: (n, 3, h, w) in [0, 1].
            embeds: (n, tokens, width), of `encode`.
            negative_embeds: likewise, or None for a single branch.
            seeds: (n,), modulo 2^64. Each picture has a generator of its own, on the CPU, for all that is
                drawn for it.
            settings: noise_level, num_inference_steps and guidance_scale of the pipeline.

        Returns:
            (n, 3, 4 h, 4 w) float32 in [0, 1].
        """
        if negative_embeds is None:
            settings["guidance_scale"] = 1.0
        with self._borrowed() as pipe:
            images = pipe(
                image=images,
                prompt_embeds=embeds,
                negative_prompt_embeds=negative_embeds,
                generator=[torch.Generator().manual_seed(seed % 2**64) for seed in seeds],
                output_type="pt",
                **settings,
            ).images
        return images.float()

    @contextmanager
    def _borrowed(self) -> Iterator[Any]:
        """A pipeline of the same networks whose schedulers, bar and checker are nobody else's."""
        pipe = copy.copy(self._pipe)
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        pipe.low_res_scheduler = copy.deepcopy(pipe.low_res_scheduler)
        pipe.safety_checker = None  # it blackens pictures
        pipe.set_progress_bar_config(disable=True)
        modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        dtype = pipe.vae.dtype
        with frozen(modules), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*upcast_vae.*", FutureWarning)
            try:
                yield pipe
            finally:
                if pipe.vae.dtype != dtype:  # diffusers widens it for decoding, and an error leaves it so
                    pipe.vae.to(dtype)
