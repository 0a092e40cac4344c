"""Floor 3: drop-in diffusers pipelines that watch themselves."""

from __future__ import annotations

from .around import around
from .guard import Guard, Mitigation
from .stable_diffusion import StableDiffusionPipeline, StableDiffusionPipelineOutput
from .stable_diffusion_xl import StableDiffusionXLPipeline, StableDiffusionXLPipelineOutput

__all__ = [
    "Guard",
    "Mitigation",
    "StableDiffusionPipeline",
    "StableDiffusionPipelineOutput",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLPipelineOutput",
    "around",
]
