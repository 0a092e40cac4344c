"""diffusers' StableDiffusionXLPipeline that watches itself."""

from __future__ import annotations

from dataclasses import dataclass

import diffusers
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput as _Output
from torch import Tensor

from pumice.pipelines.guarded import Guarded


@dataclass
class StableDiffusionXLPipelineOutput(_Output):  # type: ignore[misc]
    """diffusers' output, and what was asked for of `noise_norms` and `flagged`, see `Guarded.__call__`."""

    noise_norms: Tensor | None = None
    flagged: Tensor | None = None


class StableDiffusionXLPipeline(Guarded, diffusers.StableDiffusionXLPipeline):  # type: ignore[misc]
    """Stable Diffusion XL, loaded, saved and called as diffusers' class of the same name.

    `pumice.pipelines.around(pipe)` makes one that shares the networks of a loaded pipeline.
    """

    output = StableDiffusionXLPipelineOutput
