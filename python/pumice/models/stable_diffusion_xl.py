"""Stable Diffusion XL: two CLIP text encoders side by side, a pooled embedding, picture sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import DiffusionModel
from .prompts import PromptEmbeds


class StableDiffusionXL(DiffusionModel):
    family = "stable_diffusion_xl"
    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.upcast_vae = bool(self.vae.config.force_upcast)

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        return (self.pipe.text_encoder, self.pipe.text_encoder_2)

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        return (self.pipe.tokenizer, self.pipe.tokenizer_2)

    def unconditional(self) -> PromptEmbeds:
        empty = self.encode_prompt("")
        if not self.pipe.config.force_zeros_for_empty_prompt or empty.pooled is None:
            return empty
        return PromptEmbeds(torch.zeros_like(empty.embeds), torch.zeros_like(empty.pooled), empty.tokens)

    def _encode_text(self, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
        first = self.pipe.text_encoder(ids[0], output_hidden_states=True)
        second = self.pipe.text_encoder_2(ids[1], output_hidden_states=True)
        # the layer before the last of both
        embeds = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1)
        return embeds.to(self.pipe.text_encoder_2.dtype), second.text_embeds

    def _conditioning(self, latents: Tensor, prompt_embeds: PromptEmbeds) -> dict[str, Any]:
        """The pooled embedding, and original size, crop corner, target size: the picture's own."""
        if prompt_embeds.pooled is None:
            raise ValueError(
                "prompt_embeds: got no pooled ones, expected them from this model's encode_prompt"
            )
        height, width = (side * self.vae_scale_factor for side in latents.shape[2:])
        time_ids = latents.new_zeros(len(latents), 6)  # filled in place: nothing is copied from the host
        time_ids[:, 0::4] = height
        time_ids[:, 1::4] = width
        pooled = prompt_embeds.pooled.to(latents.device, latents.dtype).expand(len(latents), -1)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
