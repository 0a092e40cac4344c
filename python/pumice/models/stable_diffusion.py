"""Stable Diffusion 1.x and 2.x, epsilon and v-prediction: one CLIP text encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .model import DiffusionModel
from .prompts import PromptEmbeds


class StableDiffusion(DiffusionModel):
    family = "stable_diffusion"
    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")

    def _encode_text(self, ids: list[Tensor]) -> tuple[Tensor, None]:
        return self.pipe.text_encoder(ids[0]).last_hidden_state, None

    def _conditioning(self, latents: Tensor, prompt_embeds: PromptEmbeds) -> dict[str, Any]:
        return {}
