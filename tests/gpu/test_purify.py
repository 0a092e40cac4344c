"""Purification and personalization on a GPU: against the CPU, and captured steps against eager ones."""

from __future__ import annotations

import pytest
import torch

from pumice import personalize, purify, testbed
from pumice.models.graph import Graphed

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return testbed.subject_trial(0).pictures[:3]


def pixels(images: torch.Tensor, device: str) -> torch.Tensor:
    return purify.gridpure(images.to(device), testbed.load_denoiser().to(device), t=5, iterations=2)


def latents(images: torch.Tensor, device: str) -> torch.Tensor:
    pipe = testbed.load(device=device)
    return purify.latent_diffpure(images.to(device), pipe, "a photo of a creature", t=10)


def perceived(images: torch.Tensor, device: str) -> torch.Tensor:
    return purify.impress(images.to(device), testbed.load(device=device), steps=10)


def upscaled(images: torch.Tensor, device: str) -> torch.Tensor:
    how = {"num_inference_steps": 5, "guidance_scale": 1.0}
    return purify.codesr(images.to(device), testbed.load_upscaler().to(device), "creature", **how)


@pytest.mark.parametrize("work", [pixels, latents, perceived, upscaled])
def test_a_gpu_gives_what_the_cpu_gives(work, pictures):
    here, there = work(pictures, "cpu"), work(pictures, "cuda")
    assert there.device.type == "cuda"
    assert (there.cpu() - here).abs().mean() < 2e-3


@pytest.mark.parametrize("work", [pixels, latents])
def test_a_captured_step_is_the_eager_one(work, pictures, monkeypatch, recwarn):
    captured = work(pictures, "cuda")
    assert not [warning for warning in recwarn if "CUDA graph" in str(warning.message)]
    monkeypatch.setattr(Graphed, "__call__", lambda self, *args: self._work(*args))
    torch.testing.assert_close(captured, work(pictures, "cuda"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["fp32_master", "lora"])
def test_losses_are_those_of_the_cpu(mode, pictures):
    how = {"steps": 5, "learning_rate": 1e-4, "batch_size": 2, "mode": mode}
    here, there = (
        personalize.dreambooth(testbed.load(device=device), pictures, "a photo of a sks creature", **how)
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(there.losses, here.losses, rtol=1e-2, atol=0)
