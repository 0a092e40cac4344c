"""Floor 3: pictures perturbed so that models cannot learn them."""

from __future__ import annotations

from .advdm import advdm
from .arguments import ProtectionWarning
from .mist import mist
from .pgd import Options
from .photoguard import photoguard
from .sds import sds, sdst
from .targets import text_pattern

__all__ = ["Options", "ProtectionWarning", "advdm", "mist", "photoguard", "sds", "sdst", "text_pattern"]
