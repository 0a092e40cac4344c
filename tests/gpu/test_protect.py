"""Protections on a GPU: the captured step against the eager one and the CPU, and what `plan` estimates."""

from __future__ import annotations

import pytest
import torch

from pumice import protect, testbed
from pumice.models.graph import Graphed

EPS, STEP = 8 / 255, 1 / 255
METHODS = [protect.photoguard, protect.advdm, protect.mist, protect.sds, protect.sdst, protect.caat]


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return testbed.subject_trial(0).pictures[:3]


def agree(a: torch.Tensor, b: torch.Tensor, clean: torch.Tensor) -> float:
    a, b, clean = (x.cpu() for x in (a, b, clean))
    return ((a - clean).sign() == (b - clean).sign()).double().mean().item()


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_captured_step_is_the_eager_one(method, pictures, monkeypatch, recwarn):
    pipe, how = testbed.load(device="cuda"), {"eps": EPS, "step_size": STEP, "steps": 6}
    captured = method(pictures.cuda(), pipe, **how)
    assert captured.device.type == "cuda"
    assert not [warning for warning in recwarn if "CUDA graph" in str(warning.message)]
    monkeypatch.setattr(Graphed, "__call__", lambda self, *args: self._work(*args))
    eager = method(pictures.cuda(), pipe, **how)
    assert agree(captured, eager, pictures) > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_is_that_of_the_cpu(method, pictures):
    how = {"eps": EPS, "step_size": STEP, "steps": 1, "random_start": False}
    here, there = (
        method(pictures.to(device), testbed.load(device=device), **how) for device in ("cpu", "cuda")
    )
    assert agree(here, there, pictures) > 0.99


@pytest.mark.gpu
def test_surrogates_learn_between_captured_steps(pictures, recwarn):
    pipe = testbed.load(device="cuda")
    how = {"max_train_steps": 2, "max_adv_train_steps": 3, "num_class_images": 2, "lr": 1e-4, "eps": EPS}
    for surrogate in ("fp32_master", "lora"):
        found = protect.aspl(pictures.cuda(), pipe, surrogate=surrogate, **how)
        assert (found.cpu() - pictures).abs().max() <= EPS + 1e-6
    assert not [warning for warning in recwarn if "CUDA graph" in str(warning.message)]


@pytest.mark.gpu
def test_the_plan_is_what_a_step_takes(pictures):
    pipe = testbed.load(device="cuda")
    planned = protect.plan(pipe, "advdm", "8GB")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graphed, "__call__", lambda self, *args: self._work(*args))
        protect.advdm(pictures.cuda(), pipe, steps=2)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken == pytest.approx(planned.fixed + len(pictures) * planned.each, rel=0.3)
