from __future__ import annotations

from collections.abc import Iterator

import pytest

from ops.test_attention_columns import *  # noqa: F403
from pumice import ops


@pytest.fixture
def kernel() -> Iterator[str]:
    with ops.backend("triton"):
        yield "triton"
