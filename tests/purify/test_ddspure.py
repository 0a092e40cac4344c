"""DDSPure: noise of the size of a budget."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from pumice import purify, testbed
from pumice.models import NoiseSchedule
from pumice.purify.ddspure import timestep_of
from pumice.testbed import world

SCHEDULE = NoiseSchedule.from_config(DDPMScheduler().config)


def tiny() -> DDPMPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        )
    return DDPMPipeline(unet.eval(), DDPMScheduler(variance_type="fixed_small"))


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("level", "index"), [(4, 2), (8, 6), (11, 10), (16, 16)])
def test_look_ups_of_the_published_code(level, index):
    assert timestep_of(SCHEDULE, level / 255) + 1 == index


@pytest.mark.parametrize("level", [4, 8, 11, 16, 60])
def test_the_noise_is_as_strong_as_the_budget(level):
    alpha, sigma = SCHEDULE.alpha_sigma(torch.tensor(timestep_of(SCHEDULE, 2 * level / 255)))
    assert float(sigma / alpha) / 2 * 255 == pytest.approx(level, rel=0.06)  # [-1, 1] is twice as wide


@pytest.mark.parametrize(
    ("how", "timesteps"),
    [
        ({}, list(range(22, -1, -1))),
        ({"eps": 4 / 255}, [5, 4, 3, 2, 1, 0]),
        ({"sampler": "one_shot"}, [22]),
        ({"variant": "ds"}, [40, 36, 32, 28, 24, 20, 16, 12, 8, 4]),
        ({"variant": "ds", "eps": 4 / 255}, [8, 4]),
    ],
)
def test_where_it_walks(how, timesteps):
    pipe, seen = tiny(), []
    pipe.unet.register_forward_pre_hook(lambda _, given: seen.append((int(given[1]), given[0].mean())))
    purify.ddspure(torch.full((4, 3, 16, 16), 0.5), pipe, **how)
    assert [t for t, _ in seen] == timesteps
    reaches = 0.5 if how.get("variant") == "ds" else 0.0
    assert float(seen[0][1]) == pytest.approx(reaches, abs=0.03)


def test_it_is_diffpure_from_its_own_timestep():
    pipe, images = tiny(), pictures()
    found = purify.ddspure(images, pipe, eps=8 / 255, seed=3)
    assert torch.equal(found, purify.diffpure(images, pipe, t=16, seed=3))


def test_a_batch_is_its_pictures_alone():
    pipe, images = tiny(), pictures(3)
    for variant in ("official", "ds"):
        batch = purify.ddspure(images, pipe, variant=variant, seed=2)
        alone = [purify.ddspure(images[i : i + 1], pipe, variant=variant, seed=2 + i) for i in range(3)]
        torch.testing.assert_close(batch, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["ddpm", "one_shot"])
def test_the_trained_denoiser_takes_noise_away(how):
    clean = torch.from_numpy(world.subject(1, 0))[None]
    sign = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).sign()
    noisy = (clean + 11 / 255 * sign).clamp(0, 1)
    found = purify.ddspure(noisy, testbed.load_denoiser(), sampler=how, size="native")
    before, after = ((each - clean).square().mean().log10() * -10 for each in (noisy, found))
    assert after > before + 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eps": 11}, ValueError, r"eps: got 11, expected 0 to 1.*11/255"),
        ({"eps": None}, TypeError, "eps: got a NoneType"),
        ({"variant": "gp"}, ValueError, "variant: got 'gp'"),
        ({"variant": "ds", "num_inference_steps": 3}, ValueError, "^num_inference_steps: got 3"),
        ({"size": "crop"}, ValueError, "size: got 'crop'"),
        ({"t": 3}, TypeError, "t"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        purify.ddspure(pictures(), tiny(), **arguments)
