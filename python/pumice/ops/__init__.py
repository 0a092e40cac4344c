"""Floor 1: the operators. Each is one file: its formula, its plain-torch reference, and its backends."""

from __future__ import annotations

from pumice.ops._registry import BackendError, backend
from pumice.ops.attention_columns import attention_columns
from pumice.ops.bilateral_filter import bilateral_filter
from pumice.ops.differentiable_jpeg import differentiable_jpeg
from pumice.ops.group_norm_silu import group_norm_silu
from pumice.ops.guidance_magnitude import GuidanceMagnitude, guidance_magnitude
from pumice.ops.guidance_step import GuidanceStep, guidance_step
from pumice.ops.low_rank_edit import low_rank_edit_
from pumice.ops.median_filter import median_filter
from pumice.ops.pgd_step import pgd_step, pgd_step_
from pumice.ops.separable_sum import separable_sum
from pumice.ops.total_variation import total_variation

__all__ = [
    "BackendError",
    "GuidanceMagnitude",
    "GuidanceStep",
    "attention_columns",
    "backend",
    "bilateral_filter",
    "differentiable_jpeg",
    "group_norm_silu",
    "guidance_magnitude",
    "guidance_step",
    "low_rank_edit_",
    "median_filter",
    "pgd_step",
    "pgd_step_",
    "separable_sum",
    "total_variation",
]
