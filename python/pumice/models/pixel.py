"""A denoiser of pixels: what purification needs to know of an unconditional diffusion model of pictures."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .guided_diffusion import load_guided_diffusion
from .loading import Backend, check_backend, check_device, one_line_errors
from .schedule import NoiseSchedule

Variance = Literal["learned_range", "fixed_small", "fixed_large"]

_PIPELINES = ("DDPMPipeline", "DDIMPipeline")  # of folders


class Denoised(NamedTuple):
    """What a denoiser makes of x_t.

    Attributes:
        x0: shaped as x_t.
        share: v of the variance exp(v log beta + (1 - v) log beta~), in about [0, 1], shaped as x0; None
            stands for 0.
    """

    x0: Tensor
    share: Tensor | None


class PixelDenoiser:
    """An unconditional denoiser of pictures in [-1, 1], such as those of guided diffusion (arXiv:2105.05233).

    Attributes:
        unet: the network, (B, 3, h, w) and timesteps to (B, 3 or 6, h, w).
        schedule: its noise levels.
        variance: of its ancestral steps.
        size: px, of the pictures that it was trained on, or None where it does not say.
    """

    def __init__(self, unet: Any, scheduler: Any) -> None:
        self.unet = unet
        variance = scheduler.config.get("variance_type", "fixed_small")
        self.variance: Variance = variance.removesuffix("_log")
        if self.variance not in get_args(Variance):
            raise UnsupportedModelError(
                f"denoiser: its variance_type is {variance!r}, expected learned_range or a fixed one"
            )
        self._check(unet)
        self.schedule = NoiseSchedule.from_config(scheduler.config)
        size = unet.config.sample_size
        self.size: int | None = size if size is None or isinstance(size, int) else min(size)

    def __repr__(self) -> str:
        return f"PixelDenoiser({self.size} px, {self.variance}, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def multiple(self) -> int:
        """What sides of pictures must be multiples of."""
        return int(2 ** (len(self.unet.config.block_out_channels) - 1))

    def __call__(self, x: Tensor, timestep: Tensor) -> Denoised:
        """Denoise x (B, 3, h, w) float32 at one timestep, a tensor (); x0 is clipped to [-1, 1]."""
        given = x.to(self.dtype, memory_format=torch.channels_last)
        output = self.unet(given, timestep, return_dict=False)[0].to(x.dtype)
        learned = None
        if self.variance == "learned_range":
            output, learned = output.chunk(2, dim=1)
        return self._denoised(output, learned, x, timestep)

    def _denoised(self, output: Tensor, learned: Tensor | None, x: Tensor, timestep: Tensor) -> Denoised:
        """What follows from both halves of what a network gives."""
        share = torch.ones_like(x) if self.variance == "fixed_large" else None
        if self.variance == "learned_range" and learned is not None:
            share = (learned + 1) / 2
        return Denoised(self.schedule.to_x0(output, x, timestep).clamp(-1, 1), share)

    def _check(self, unet: Any) -> None:
        _check_unconditional(unet)
        config = unet.config
        channels = 6 if self.variance == "learned_range" else 3
        if (config.in_channels, config.out_channels) != (3, channels):
            raise UnsupportedModelError(
                f"denoiser: takes {config.in_channels} channels and gives {config.out_channels}, expected 3 "
                f"and {channels}, as its variance is {self.variance}"
            )
        if config.get("class_embed_type") or config.get("num_class_embeds"):
            raise UnsupportedModelError("denoiser: it is of classes, expected an unconditional one")


def load_denoiser(
    source: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: Backend = "torch",
) -> PixelDenoiser:
    """Open an unconditional denoiser of pixels.

    Args:
        source: a diffusers pipeline with a `UNet2DModel` and a scheduler (DDPM, DDIM), a bare `UNet2DModel`,
            which is taken for one of guided diffusion (1000 steps, betas linear from 1e-4 to 0.02), the path
            of a diffusers folder or of a guided-diffusion checkpoint in safetensors, or a `PixelDenoiser`,
            which is returned.
        dtype, device: for a path; default float32 on the CPU.
        backend: "onnxruntime" runs it there (`models.onnxruntime`).

    Raises:
        UnsupportedModelError: for a model of another kind.
        TypeError: if source is none of the above.
        ValueError: if a path is not a model or cannot be read, nothing can run on the device, dtype or
            device are given with a loaded model, or for an unknown backend or one that is not installed.
    """
    check_backend(backend)
    model = _loaded(source, dtype, device)
    if backend == "torch":
        return model
    from .onnx import onnxruntime

    return onnxruntime(model)


def _loaded(source: Any, dtype: torch.dtype | None, device: torch.device | str | None) -> PixelDenoiser:
    if isinstance(source, str | PathLike):
        check_device(device)
        found = _opened(Path(source))
        # that of diffusers warns of every cast
        nn.Module.to(found.unet, device=device, dtype=dtype or torch.float32).eval()
        return found
    if dtype is not None or device is not None:
        raise ValueError("dtype, device: got one with a loaded denoiser, expected a path; use its to")
    if isinstance(source, PixelDenoiser):
        return source
    if hasattr(source, "unet") and hasattr(source, "scheduler"):
        if any(getattr(source, name, None) is not None for name in ("vae", "vqvae")):
            raise UnsupportedModelError(
                f"denoiser: got a {type(source).__name__}, which works in latents, expected one of pixels"
            )
        return PixelDenoiser(source.unet, source.scheduler)
    if hasattr(source, "forward"):
        _check_unconditional(source)
        return PixelDenoiser(source, _guided_diffusion_scheduler(source.config.out_channels))
    raise TypeError(
        f"denoiser: got a {type(source).__name__}, expected a diffusers pipeline or UNet2DModel, a path or a "
        "PixelDenoiser"
    )


def _check_unconditional(unet: Any) -> None:
    from diffusers import UNet2DModel

    plain = getattr(unet, "_orig_mod", unet)  # of torch.compile
    plain = getattr(plain, "exported_from", plain)  # of ONNX Runtime
    if not isinstance(plain, UNet2DModel):
        raise UnsupportedModelError(f"denoiser: got a {type(plain).__name__}, expected a UNet2DModel")


def _opened(path: Path) -> PixelDenoiser:
    from diffusers import DDPMPipeline

    if path.is_file():
        unet = load_guided_diffusion(path)
        return PixelDenoiser(unet, _guided_diffusion_scheduler(unet.config.out_channels))
    if not (path / "model_index.json").is_file():
        raise ValueError(f"denoiser: {str(path)!r} is not a diffusers folder")
    with one_line_errors(path, "denoiser"):
        name = DDPMPipeline.load_config(path).get("_class_name")
    if name not in _PIPELINES:
        raise UnsupportedModelError(f"denoiser: {str(path)!r} is a {name}, expected a {_PIPELINES[0]}")
    with one_line_errors(path, "denoiser"):
        pipe = DDPMPipeline.from_pretrained(path, use_safetensors=True)
    return PixelDenoiser(pipe.unet, pipe.scheduler)


def _guided_diffusion_scheduler(out_channels: int) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(variance_type="learned_range" if out_channels == 6 else "fixed_large")
