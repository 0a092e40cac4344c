"""Floor 4: a small, trained text-to-image pipeline and its drawn world; tiny random ones of every family."""

from __future__ import annotations

from . import world
from .labels import classifier, replays
from .shipped import (
    DENOISER,
    UPSCALER,
    WEIGHTS,
    calibration,
    fresh_prompts,
    load,
    load_clip,
    load_denoiser,
    load_identity,
    load_reader,
    load_upscaler,
)
from .similarity import REPLAYED, similarity
from .subjects import SubjectTrial, subject_trial
from .tiny import tiny_pipeline
from .trials import Trial, memorized_captions, trial

__all__ = [
    "DENOISER",
    "REPLAYED",
    "UPSCALER",
    "WEIGHTS",
    "SubjectTrial",
    "Trial",
    "calibration",
    "classifier",
    "fresh_prompts",
    "load",
    "load_clip",
    "load_denoiser",
    "load_identity",
    "load_reader",
    "load_upscaler",
    "memorized_captions",
    "replays",
    "similarity",
    "subject_trial",
    "tiny_pipeline",
    "trial",
    "world",
]
