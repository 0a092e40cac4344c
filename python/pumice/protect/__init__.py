"""Floor 3: pictures perturbed so that models cannot learn them."""

from __future__ import annotations

from .ace import ace
from .advdm import advdm
from .arguments import ProtectionWarning
from .aspl import aspl, easpl
from .caat import caat
from .fsmg import fsmg
from .glaze import contrast_masked_error, glaze
from .learner import SurrogateOptions
from .metacloak import metacloak
from .mist import mist
from .pgd import Options
from .photoguard import photoguard
from .photoguard_diffusion import photoguard_diffusion
from .plan import Plan, plan
from .random_noise import random_noise
from .sds import sds, sdst
from .simac import select_timesteps, simac
from .targets import text_pattern

__all__ = [
    "Options",
    "Plan",
    "ProtectionWarning",
    "SurrogateOptions",
    "ace",
    "advdm",
    "aspl",
    "caat",
    "contrast_masked_error",
    "easpl",
    "fsmg",
    "glaze",
    "metacloak",
    "mist",
    "photoguard",
    "photoguard_diffusion",
    "plan",
    "random_noise",
    "sds",
    "sdst",
    "select_timesteps",
    "simac",
    "text_pattern",
]
