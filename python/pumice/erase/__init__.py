"""Floor 3: take concepts out of a model, in closed form or by training, and keep the rest."""

from __future__ import annotations

from .age import age
from .all_but_one import all_but_one
from .arguments import ErasureWarning
from .concept_ablation import concept_ablation
from .debias import debias
from .degeneration_tuning import degeneration_tuning
from .eap import eap
from .esd import esd
from .few_shot import few_shot
from .few_shot_ascent import few_shot_ascent
from .forget_me_not import forget_me_not
from .kpop import RecoveryKey, kpop
from .mace import mace_fuse, mace_refine
from .mace_lora import mace, mace_lora
from .preserve import Preserve
from .rece import rece
from .safety_lora import safety_lora
from .sdd import sdd
from .speed import speed
from .spm import spm
from .time import time
from .trainer import Options
from .transport import transport
from .trce import trce
from .uce import uce, uce_sweep

__all__ = [
    "ErasureWarning",
    "Options",
    "Preserve",
    "RecoveryKey",
    "age",
    "all_but_one",
    "concept_ablation",
    "debias",
    "degeneration_tuning",
    "eap",
    "esd",
    "few_shot",
    "few_shot_ascent",
    "forget_me_not",
    "kpop",
    "mace",
    "mace_fuse",
    "mace_lora",
    "mace_refine",
    "rece",
    "safety_lora",
    "sdd",
    "speed",
    "spm",
    "time",
    "transport",
    "trce",
    "uce",
    "uce_sweep",
]
