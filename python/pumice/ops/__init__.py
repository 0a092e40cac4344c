"""Floor 1: the operators. Each is one file: its formula, its plain-torch reference, and its backends."""

from __future__ import annotations

from pumice.ops._registry import BackendError, backend
from pumice.ops.group_norm_silu import group_norm_silu
from pumice.ops.guidance_magnitude import GuidanceMagnitude, guidance_magnitude
from pumice.ops.guidance_step import GuidanceStep, guidance_step
from pumice.ops.low_rank_edit import low_rank_edit_
from pumice.ops.pgd_step import pgd_step, pgd_step_

__all__ = [
    "BackendError",
    "GuidanceMagnitude",
    "GuidanceStep",
    "backend",
    "group_norm_silu",
    "guidance_magnitude",
    "guidance_step",
    "low_rank_edit_",
    "pgd_step",
    "pgd_step_",
]
