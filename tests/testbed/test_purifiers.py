"""The denoiser of pixels and the upscaler know their world: on pictures that they have not seen."""

import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionUpscalePipeline
from torch.nn.functional import interpolate, mse_loss

from pumice import models, testbed
from pumice.testbed import shipped


@pytest.fixture(scope="module")
def trial():
    return testbed.subject_trial(1)


def psnr(a, b):
    return -10 * mse_loss(a, b).log10().item()


def test_they_are_small_and_of_diffusers():
    folders = shipped.DENOISER, shipped.UPSCALER
    assert sum(file.stat().st_size for each in folders for file in each.rglob("*") if file.is_file()) <= 10e6
    assert type(testbed.load_denoiser()) is DDPMPipeline
    assert type(testbed.load_upscaler()) is StableDiffusionUpscalePipeline
    denoiser = models.load_denoiser(shipped.DENOISER)
    assert (denoiser.size, denoiser.variance) == (32, "learned_range")


@pytest.mark.parametrize(("t", "least"), [(10, 41.0), (40, 35.0), (100, 30.0), (250, 23.0)])
def test_one_prediction_of_a_noisy_picture(trial, t, least):
    denoiser, clean = models.load_denoiser(testbed.load_denoiser()), trial.pictures[:4] * 2 - 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(t))
    noisy = denoiser.schedule.add_noise(clean, noise, t)
    with torch.no_grad():
        found = denoiser(noisy, torch.tensor(t))
    assert psnr(found.x0 / 2, clean / 2) >= least > psnr(noisy / 2, clean / 2)
    assert found.share is not None and 0 < found.share.mean() < 1


def test_what_the_upscaler_draws_is_sharp_and_the_same_picture(trial):
    small = interpolate(trial.pictures[:4], scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)
    pipe = testbed.load_upscaler()
    drawn = pipe(
        ["a photo of a creature"] * 4,
        image=small,
        num_inference_steps=10,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
        output_type="pt",
    ).images
    blown_up = interpolate(small, scale_factor=4, mode="bicubic").clamp(0, 1)
    assert psnr(drawn, trial.pictures[:4]) >= 20
    assert trial.quality(drawn).mean() >= trial.quality(blown_up).mean() + 0.1
    assert trial.identity(drawn).mean() >= 0.6
