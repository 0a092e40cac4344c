from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from pumice import ops

_TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
)


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture(params=["cpu-default", "cpu-avx2", "cpu-avx512", _TRITON])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every backend but the reference, and the C++ one at each instruction level that this processor has."""
    backend, _, level = request.param.partition("-")
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("kernels are compiled for the GPU, see tests/gpu")
    if level:
        from pumice import _native

        if _native.CPU_LEVELS.index(level) > _native.extension("_cpu").best_isa():
            pytest.skip(f"this processor has no {level}")
        monkeypatch.setenv("PUMICE_CPU_ISA", level)
    with ops.backend(backend):
        yield backend
