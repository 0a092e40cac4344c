"""The tests of tests/ops again, on a GPU; without one nothing here is collected."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pumice import ops

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.fixture(params=["cuda", "triton"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.backend(request.param):
        yield request.param
