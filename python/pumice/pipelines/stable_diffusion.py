"""diffusers' StableDiffusionPipeline that watches itself."""

from __future__ import annotations

from dataclasses import dataclass

import diffusers
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput as _Output
from torch import Tensor

from pumice.pipelines.guarded import Guarded


@dataclass
class StableDiffusionPipelineOutput(_Output):  # type: ignore[misc]
    """diffusers' output, and what was asked for of `noise_norms` and `flagged`, see `Guarded.__call__`."""

    noise_norms: Tensor | None = None
    flagged: Tensor | None = None


class StableDiffusionPipeline(Guarded, diffusers.StableDiffusionPipeline):  # type: ignore[misc]
    """Stable Diffusion 1 and 2, loaded, saved and called as diffusers' class of the same name.

    `pumice.pipelines.around(pipe)` makes one that shares the networks of a loaded pipeline.
    """

    output = StableDiffusionPipelineOutput
