"""From a loaded pipeline of diffusers to one that watches itself."""

from __future__ import annotations

import inspect
from typing import Any

from pumice import models

from .stable_diffusion import StableDiffusionPipeline
from .stable_diffusion_xl import StableDiffusionXLPipeline

_KINDS = {"stable_diffusion": StableDiffusionPipeline, "stable_diffusion_xl": StableDiffusionXLPipeline}


def around(pipe: Any) -> Any:
    """A guarded pipeline that shares the networks of `pipe`, as they are: dtypes, devices, adapters.

    diffusers' own `from_pipe` casts them, for both pipelines, to float32 unless told otherwise.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel.

    Raises:
        UnsupportedModelError: if the model's family is not supported.
    """
    model = models.load(pipe)
    pipe, kind = model.pipe, _KINDS[model.family]
    parts = pipe.components
    named = inspect.signature(kind.__init__).parameters
    options = {name: value for name, value in pipe.config.items() if name in named and name not in parts}
    made: Any = kind(**parts, **options)
    if hasattr(pipe, "watermark"):  # an option of the constructor that it does not register
        made.watermark = pipe.watermark
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made
