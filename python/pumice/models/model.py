"""What every method knows of a text-to-image model, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from . import vae
from .attention import CrossAttentionLayer, check_editable, cross_attention_layers
from .errors import UnsupportedModelError
from .freezing import frozen
from .prompts import PromptEmbeds, PromptTokens, tokenize
from .schedule import NoiseSchedule, PredictionType


class DiffusionModel(ABC):
    """A diffusers pipeline as methods see it: text to embeddings, pictures to latents, noise prediction.

    Latents, noise and pictures come out in float32 whatever the networks' dtype (float64 for float64 ones);
    only `predict` returns what the network does. Nothing here turns gradients off or changes the pipeline.

    Attributes:
        pipe: the diffusers pipeline.
        schedule: its noise schedule, as `pipe.scheduler` had it when the model was loaded.
        upcast_vae: whether the autoencoder runs in float32 although its weights are float16.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    _device: torch.device | None = None  # inside `frozen`

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        if None in (self.unet, self.vae, pipe.scheduler, *self.text_encoders, *self.tokenizers):
            missing = ", ".join(name for name, part in pipe.components.items() if part is None)
            raise UnsupportedModelError(f"pipe: {type(pipe).__name__} lacks a part (None are: {missing})")
        channels, latent_channels = self.unet.config.in_channels, self.vae.config.latent_channels
        if channels != latent_channels:
            raise UnsupportedModelError(
                f"pipe: the denoiser takes {channels} channels and latents have {latent_channels}; "
                "inpainting and other image-conditioned models are not supported"
            )
        if self.unet.config.time_cond_proj_dim is not None:
            raise UnsupportedModelError(
                "pipe: guidance-distilled denoisers (time_cond_proj_dim) are not supported"
            )
        self.schedule = NoiseSchedule.from_config(pipe.scheduler.config)
        self.upcast_vae = False

    def __repr__(self) -> str:
        return f"DiffusionModel({self.family}, {self.prediction_type}, {self.dtype}, {self.device})"

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    @property
    def eager_unet(self) -> Any:
        """The denoiser as it is inside torch.compile, which would change the names of its weights."""
        return getattr(self.unet, "_orig_mod", self.unet)

    @property
    def vae(self) -> Any:
        return self.pipe.vae

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        return (self.pipe.text_encoder,)

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        return (self.pipe.tokenizer,)

    @property
    def device(self) -> torch.device:
        """Where the networks run; for offloaded ones not where their weights wait."""
        return self._device or torch.device(self.pipe._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """That of the denoiser; the autoencoder may have another."""
        return cast(torch.dtype, self.unet.dtype)

    @property
    def prediction_type(self) -> PredictionType:
        return self.schedule.prediction_type

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent, along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def cross_attention(self) -> Mapping[str, CrossAttentionLayer]:
        """The denoiser's cross-attention layers by name, in the order in which they run."""
        if hasattr(self.unet, "exported_from"):
            raise UnsupportedModelError(
                "pipe: its denoiser runs in ONNX Runtime, where its layers are out of reach; load it with "
                "backend='torch'"
            )
        return cross_attention_layers(self.unet)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of that size in pixels, by default the model's own size.

        Raises:
            ValueError: if a side is not a multiple of `vae_scale_factor`.
        """
        scale, size = self.vae_scale_factor, self.unet.config.sample_size
        default = (size, size) if isinstance(size, int) else tuple(size)
        height = default[0] * scale if height is None else height
        width = default[1] * scale if width is None else width
        for name, side in (("height", height), ("width", width)):
            if side < scale or side % scale:
                raise ValueError(f"{name}: got {side}, expected a positive multiple of {scale}")
        return self.vae.config.latent_channels, height // scale, width // scale

    def tokenize(self, prompts: str | Sequence[str]) -> tuple[PromptTokens, ...]:
        """Where everything stands in each prompt, without encoding it; with two tokenizers, the first one's.

        Raises:
            TypeError: if a prompt is not a string.
            ValueError: if there is none.
        """
        return self._tokenize(prompts, self.tokenizers[0])

    def encode_prompt(self, prompts: str | Sequence[str], *, padded: bool = True) -> PromptEmbeds:
        """Encode prompts as the pipeline does, and tell where every token is and which text did not fit.

        Args:
            prompts: one or several.
            padded: to the tokenizer's length, as the denoiser expects. False stops behind the last EOS of the
                longest prompt: CLIP's text encoders are causal, so what stands there is the same.

        Raises as `tokenize`.
        """
        tokens = [self._tokenize(prompts, tokenizer) for tokenizer in self.tokenizers]
        if not padded:
            length = 1 + max(prompt.eos for rows in tokens for prompt in rows)
            tokens = [tuple(prompt.cut(length) for prompt in rows) for rows in tokens]
        ids = [torch.tensor([prompt.ids for prompt in rows], device=self.device) for rows in tokens]
        return PromptEmbeds(*self._encode_text(ids), tokens[0])

    def unconditional(self) -> PromptEmbeds:
        """The one embedding that the pipeline guides away from when there is no negative prompt."""
        return self.encode_prompt("")

    def encode_image(
        self,
        images: Tensor,
        *,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Latents of pictures, shifted and scaled as the denoiser sees them; gradients flow to the pictures.

        Args:
            images: (B, 3, H, W) floating, in [0, 1]; checked for that on the CPU only, so that no loop waits
                for a GPU.
            noise: (..., B, C, h, w) standard normal: take mean + std noise, samples of the posterior, instead
                of its mean.

        Returns:
            (B, C, h, w), or shaped as the noise.

        Raises:
            TypeError: if images are not floating tensors.
            ValueError: for another shape, sides that are not multiples of `vae_scale_factor`, or, on the CPU,
                a NaN or values out of range.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: got {kind}, expected a floating tensor in [0, 1]")
        channels = self.vae.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected (B, {channels}, H, W)")
        self.latent_shape(*images.shape[2:])
        if images.device.type == "cpu" and not bool(((images > -0.001) & (images < 1.001)).all()):
            found = "NaN" if bool(images.isnan().any()) else f"{images.min():.3g} to {images.max():.3g}"
            raise ValueError(f"images: got {found}, expected values in [0, 1]")
        images = _at_least_float32(images.to(self.device))
        posterior = vae.encode(self.vae, images, upcast=self.upcast_vae)
        z = _at_least_float32(posterior.mean)
        if noise is not None:
            z = z + _at_least_float32(posterior.std) * noise.to(self.device)
        return vae.normalize(self.vae, z)

    def vjp(
        self,
        images: Tensor,
        cotangent: Callable[[Tensor], Tensor],
        *,
        noise: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """The gradient in pictures of any loss of their latents: one forward and one backward pass.

        ::

            (dz / dimages)^T cotangent(z)        z = encode_image(images, noise)

        so that a loss of several terms meets in `cotangent`, its gradient in z, and the autoencoder is passed
        once for all. What `cotangent` computes is gone from memory when the backward pass begins.

        Args:
            images, noise: as of `encode_image`.
            cotangent: from z (B, C, h, w), without history, to dloss/dz of the same shape.
            recompute: encode once without keeping anything, and again after `cotangent`: a second forward
                pass, and the graphs of autoencoder and denoiser are never in memory together.

        Returns:
            (B, 3, H, W), typed as images, in the unit of the loss per [0, 1].
        """
        images = images.detach().requires_grad_()
        with torch.set_grad_enabled(not recompute):
            z = self.encode_image(images, noise=noise)
        dz = cotangent(z.detach())
        if recompute:
            with torch.enable_grad():
                z = self.encode_image(images, noise=noise)
        (gradient,) = torch.autograd.grad(z, images, dz.to(z.dtype))
        return gradient

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of latents (B, C, h, w); gradients flow back unless clamped.

        Raises:
            ValueError: if the latents have another shape.
        """
        self._check_latents(latents)
        latents = _at_least_float32(latents.to(self.device))
        return _at_least_float32(vae.decode(self.vae, latents, upcast=self.upcast_vae)).clamp(0, 1)

    def predict(self, latents: Tensor, timesteps: int | Tensor, prompt_embeds: PromptEmbeds) -> Tensor:
        """The denoiser's raw output for noisy latents: its own dtype, and what `prediction_type` says.

        Args:
            latents: (B, C, h, w).
            timesteps: one, or (B,), one a sample.
            prompt_embeds: B prompts, or one for all.

        Raises:
            ValueError: if shapes do not fit.
        """
        self._check_latents(latents)
        batch = len(latents)
        if len(prompt_embeds) not in (1, batch):
            raise ValueError(
                f"prompt_embeds: got {len(prompt_embeds)} prompts, expected 1 or {batch}, as latents"
            )
        t = torch.as_tensor(timesteps, device=self.device)
        if t.ndim > 1 or t.numel() not in (1, batch):
            raise ValueError(f"timesteps: got shape {tuple(t.shape)}, expected () or ({batch},)")
        latents = latents.to(self.device, self.dtype)
        embeds = prompt_embeds.embeds.to(self.device, self.dtype).expand(batch, -1, -1)
        conditioning = self._conditioning(latents, prompt_embeds)
        output: Tensor = self.unet(
            latents, t, encoder_hidden_states=embeds, return_dict=False, **conditioning
        )[0]
        return output

    def predict_noise(self, latents: Tensor, timesteps: int | Tensor, prompt_embeds: PromptEmbeds) -> Tensor:
        """epsilon, whatever the prediction type: `predict`, converted in float32."""
        latents = latents.to(self.device)
        return self.schedule.to_epsilon(self.predict(latents, timesteps, prompt_embeds), latents, timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """alpha_t latents + sigma_t noise."""
        return self.schedule.add_noise(latents, noise, timesteps)

    @contextmanager
    def frozen(self, *, data_gradient: bool = False) -> Iterator[None]:
        """Inside the block all weights are frozen and all networks in eval mode.

        Put back at its end, error or not: requires_grad, train/eval modes, attention processors, hooks. With
        `data_gradient` the networks keep only what gradients in their inputs need (`pumice.models.frozen`).
        """
        parts = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        before, self._device = self._device, self.device  # diffusers walks through all modules to tell
        try:
            with frozen(parts, data_gradient=data_gradient):
                yield
        finally:
            self._device = before

    def check_text_to_image(self) -> None:
        """Raise UnsupportedModelError unless calling the pipeline draws from text alone."""
        name = type(self.pipe).__name__
        if "Img2Img" in name:
            raise UnsupportedModelError(
                f"pipe: {name} draws from pictures, expected a text-to-image pipeline of the same components"
            )

    def check_editable(self, layers: Iterable[CrossAttentionLayer] | None = None) -> None:
        """Make sure that editing to_k and to_v of `layers` (default: all) changes what the model draws.

        Raises:
            UnsupportedModelError: for fused projections, LoRA adapters, quantised or offloaded weights.
        """
        for layer in self.cross_attention.values() if layers is None else layers:
            check_editable(layer)

    def _tokenize(self, prompts: str | Sequence[str], tokenizer: Any) -> tuple[PromptTokens, ...]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("prompts: got an empty list, expected at least one prompt")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"prompts: got a {type(prompt).__name__}, expected strings")
        # the pipeline writes out textual inversions that stand for several tokens
        return tokenize(tokenizer, self.pipe.maybe_convert_prompt(prompts, tokenizer))

    @abstractmethod
    def _encode_text(self, ids: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, L, D), and pooled ones (B, P) if any, of ids (B, L), one tensor for each encoder."""

    @abstractmethod
    def _conditioning(self, latents: Tensor, prompt_embeds: PromptEmbeds) -> dict[str, Any]:
        """What the denoiser takes beside latents, timesteps and prompt embeddings."""

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.vae.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels or not latents.is_floating_point():
            raise ValueError(
                f"latents: got {latents.dtype} of shape {tuple(latents.shape)}, "
                f"expected floating (B, {channels}, h, w)"
            )


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
