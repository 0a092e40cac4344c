"""The guided sampler against diffusers' DDIM."""

import pytest
import torch
from diffusers import DDIMScheduler

from pumice import models
from pumice.models import GuidedSampler
from pumice.testbed import tiny_pipeline


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_steps_are_those_of_diffusers(family):
    model = models.load(tiny_pipeline(family))
    scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config)
    scheduler.set_timesteps(7)
    sampler = GuidedSampler(model, 7, 5.0)
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist() == sampler.t.tolist()
    torch.manual_seed(0)
    x = expected = torch.randn(2, 4, 16, 16)
    for i, t in enumerate(scheduler.timesteps):
        cond, uncond = torch.randn(2, 2, 4, 16, 16)
        step = sampler.step(i, x, cond, uncond)
        expected = scheduler.step(uncond + 5 * (cond - uncond), t, expected).prev_sample
        x = step.sample
        torch.testing.assert_close(step.magnitude.difference, (cond - uncond).flatten(1).norm(dim=1))
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
