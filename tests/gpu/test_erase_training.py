"""Erasure by training on a GPU: against the CPU, captured passes against eager ones, 16 bits."""

from __future__ import annotations

import pytest
import torch

from pumice import erase, testbed
from pumice.models.graph import Graphed

pytestmark = pytest.mark.gpu

HOW = {"steps": 6, "pending": 3, "num_inference_steps": 10, "learning_rate": 1e-4}


def losses(device: str, dtype: torch.dtype = torch.float32, **how: object) -> torch.Tensor:
    edit = erase.esd(testbed.load(device=device, dtype=dtype), "a ball", **{**HOW, **how})
    return torch.tensor(edit.details["losses"])


def test_losses_are_those_of_the_cpu():
    torch.testing.assert_close(losses("cuda"), losses("cpu"), rtol=2e-2, atol=1e-5)


def test_a_captured_pass_is_the_eager_one(monkeypatch, recwarn):
    captured = losses("cuda")
    assert not [warning for warning in recwarn if "CUDA graph" in str(warning.message)]
    monkeypatch.setattr(Graphed, "__call__", lambda self, *args: self._work(*args))
    torch.testing.assert_close(captured, losses("cuda"), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("how", [{"sample_dtype": torch.bfloat16}, {"dtype": torch.float16, "rank": 4}])
def test_sixteen_bits_stay_near(how):
    found = losses("cuda", **how)
    torch.testing.assert_close(found.mean(), losses("cuda").mean(), rtol=0.2, atol=0)
