"""Floor 3: find what a model replays of its training pictures, say why, and stop it."""

from __future__ import annotations

from .anisotropy import Anisotropy
from .attention_entropy import AttentionEntropy
from .attention_rescaling import rescaled_attention
from .bench import Bench, bench
from .bright_ending import BrightEnding
from .calibrate import calibrate, self_test
from .calibration import Calibration
from .detect import Detection, detect
from .dori import Attack, dori
from .dynamic_guidance import transition_step
from .explain import Explanation, explain
from .filter import FilteredBatch, filter_batch, threshold_table
from .initial_noise import NoiseAdjustment, adjust_initial_noise
from .magnitude import Magnitude
from .mitigate import Mitigation, mitigate
from .nemo import nemo
from .perturb import perturb_embeds, perturb_prompt
from .sharpness import Sharpness
from .threshold import threshold_at
from .wanda import WandaStatistics, wanda, wanda_edit, wanda_statistics

__all__ = [
    "Anisotropy",
    "Attack",
    "AttentionEntropy",
    "Bench",
    "BrightEnding",
    "Calibration",
    "Detection",
    "Explanation",
    "FilteredBatch",
    "Magnitude",
    "Mitigation",
    "NoiseAdjustment",
    "Sharpness",
    "WandaStatistics",
    "adjust_initial_noise",
    "bench",
    "calibrate",
    "detect",
    "dori",
    "explain",
    "filter_batch",
    "mitigate",
    "nemo",
    "perturb_embeds",
    "perturb_prompt",
    "rescaled_attention",
    "self_test",
    "threshold_at",
    "threshold_table",
    "transition_step",
    "wanda",
    "wanda_edit",
    "wanda_statistics",
]
