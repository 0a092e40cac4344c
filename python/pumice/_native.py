"""The compiled parts: what loads, why something does not, and how they are told where to run."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

CPU_LEVELS = ("default", "avx2", "avx512")


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """`pumice._cpu` or `pumice._cuda`, and, where it is None, the reason in a line."""
    try:
        return importlib.import_module(f"pumice.{name}"), ""
    except ModuleNotFoundError:
        built = "the package was built without it" if name == "_cuda" else "the package was not built"
        return None, f"pumice.{name} is missing: {built}"
    except ImportError as error:
        return None, f"pumice.{name} does not load: {error}"


def extension(name: str) -> ModuleType:
    """The loaded extension; an ImportError with the reason where there is none."""
    module, why = load(name)
    if module is None:
        raise ImportError(why)
    return module


def cpu_level() -> int:
    """The instruction level that CPU kernels use: the best one, or PUMICE_CPU_ISA=default|avx2|avx512."""
    best: int = extension("_cpu").best_isa()
    wanted = os.environ.get("PUMICE_CPU_ISA")
    if not wanted:
        return best
    if wanted not in CPU_LEVELS:
        raise ValueError(f"PUMICE_CPU_ISA={wanted!r}: expected one of {', '.join(CPU_LEVELS)}")
    if CPU_LEVELS.index(wanted) > best:
        raise ValueError(f"PUMICE_CPU_ISA={wanted}: this processor only has {CPU_LEVELS[best]}")
    return CPU_LEVELS.index(wanted)
