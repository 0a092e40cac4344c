from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import Tensor

from pumice import models, testbed
from pumice.models import PixelDenoiser, UnsupportedModelError


def unet(out_channels: int = 6, **config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            **{
                "sample_size": 16,
                "out_channels": out_channels,
                "layers_per_block": 1,
                "block_out_channels": (8, 16),
                "down_block_types": ("DownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "UpBlock2D"),
                "norm_num_groups": 4,
                **config,
            }
        ).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small_log", "fixed_large"])
@torch.no_grad()
def test_x0_and_variance_are_those_of_diffusers(x: Tensor, prediction_type: str, variance_type: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    network = unet(6 if variance_type == "learned_range" else 3)
    denoised = PixelDenoiser(network, scheduler)(x, torch.tensor(400))
    output = network(x, 400, return_dict=False)[0]
    step = scheduler.step(output, 400, x)
    torch.testing.assert_close(denoised.x0, step.pred_original_sample, rtol=0, atol=1e-4)
    assert denoised.x0.abs().max() <= 1
    # what a share stands for: log variance between that of the posterior and beta
    now, before = scheduler.alphas_cumprod[400].double(), scheduler.alphas_cumprod[399].double()
    beta = 1 - now / before
    small, large = (beta * (1 - before) / (1 - now)).log(), beta.log()
    share = torch.zeros(()) if denoised.share is None else denoised.share
    found = (share * large + (1 - share) * small).exp()
    expected = scheduler._get_variance(400, output.chunk(2, dim=1)[-1])
    expected = expected.exp() if variance_type == "learned_range" else expected
    if variance_type == "fixed_small_log":
        expected = expected.square()  # a deviation, there
    torch.testing.assert_close(
        found.double().expand(x.shape), expected.double().expand(x.shape), rtol=1e-3, atol=0
    )


@torch.no_grad()
def test_the_network_may_be_narrower_than_the_pictures(x: Tensor) -> None:
    scheduler = DDPMScheduler(variance_type="learned_range")
    full = PixelDenoiser(unet(), scheduler)(x, torch.tensor(100))
    narrow = PixelDenoiser(unet().to(torch.bfloat16), scheduler)(x, torch.tensor(100))
    assert narrow.x0.dtype == torch.float32
    assert (narrow.x0 - full.x0).abs().max() < 0.05


def test_what_it_says_of_itself() -> None:
    three: dict[str, Any] = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    }
    network = unet(sample_size=(32, 16), **three)
    found = PixelDenoiser(network, DDPMScheduler(variance_type="learned_range"))
    assert (found.size, found.multiple, found.variance) == (16, 4, "learned_range")
    assert repr(found) == "PixelDenoiser(16 px, learned_range, torch.float32, cpu)"
    assert PixelDenoiser(unet(3, sample_size=None), DDPMScheduler()).size is None


def test_what_is_opened(tmp_path: Path, x: Tensor) -> None:
    network = unet()
    bare = models.load_denoiser(network)
    assert bare.variance == "learned_range"
    # guided diffusion's schedule: betas linear from 1e-4 to 0.02
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(bare.schedule.alphas_cumprod, (1 - betas).cumprod(0), rtol=1e-4, atol=0)
    assert models.load_denoiser(unet(3)).variance == "fixed_large"
    assert models.load_denoiser(bare) is bare
    pipe = DDPMPipeline(network, DDPMScheduler(variance_type="learned_range", num_train_timesteps=500))
    assert models.load_denoiser(pipe).schedule.num_train_timesteps == 500
    assert models.load_denoiser(DDPMPipeline(unet(3), DDIMScheduler())).variance == "fixed_small"
    pipe.save_pretrained(tmp_path)
    opened = models.load_denoiser(tmp_path)
    assert not opened.unet.training
    with torch.no_grad():
        found, expected = (each(x, torch.tensor(9)).x0 for each in (opened, models.load_denoiser(pipe)))
    torch.testing.assert_close(found, expected)
    assert models.load_denoiser(str(tmp_path), dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("network", "scheduler", "said"),
    [
        (lambda: unet(3), {"variance_type": "learned_range"}, "gives 3, expected 3 and 6"),
        (lambda: unet(6), {"variance_type": "fixed_small"}, "gives 6, expected 3 and 3"),
        (lambda: unet(1, in_channels=1), {}, "takes 1 channels"),
        (lambda: unet(6), {"variance_type": "learned"}, "variance_type is 'learned'"),
        (lambda: unet(3, num_class_embeds=10), {}, "is of classes"),
        (lambda: unet(3), {"prediction_type": "sample"}, "prediction_type"),
    ],
    ids=["fewer", "more", "grey", "learned", "classes", "of samples"],
)
def test_other_models_are_refused(network: Any, scheduler: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as found:
        models.load_denoiser(DDPMPipeline(network(), DDPMScheduler(**scheduler)))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "unet"])
def test_parts_of_other_pipelines_are_refused(part: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"denoiser: got a .*, expected a UNet2DModel"):
        models.load_denoiser(getattr(testbed.tiny_pipeline("sd1"), part))


def test_pipelines_of_latents_and_texts_are_refused(tmp_path: Path) -> None:
    latent = LDMPipeline(VQModel(block_out_channels=(32,)), unet(3), DDIMScheduler())
    with pytest.raises(UnsupportedModelError, match="a LDMPipeline, which works in latents"):
        models.load_denoiser(latent)
    latent.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="is a LDMPipeline, expected a DDPMPipeline"):
        models.load_denoiser(tmp_path)
    text = testbed.tiny_pipeline("sd1").unet
    told = UNet2DConditionModel.from_config(text.config, in_channels=3, out_channels=6)
    scheduler = DDPMScheduler(variance_type="learned_range")
    with pytest.raises(UnsupportedModelError, match="got a UNet2DConditionModel, expected a UNet2DModel"):
        models.load_denoiser(DDPMPipeline(told, scheduler))


@torch.no_grad()
def test_a_compiled_network_is_one(x: Tensor) -> None:
    network = unet()
    compiled = models.load_denoiser(torch.compile(network, backend="eager"))
    found, expected = (d(x, torch.tensor(9)).x0 for d in (compiled, models.load_denoiser(network)))
    torch.testing.assert_close(found, expected)


def test_what_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="denoiser: got a int"):
        models.load_denoiser(3)
    with pytest.raises(ValueError, match="is not a diffusers folder"):
        models.load_denoiser(tmp_path)
    with pytest.raises(ValueError, match="is not a diffusers folder"):
        models.load_denoiser(tmp_path / "missing")
    with pytest.raises(ValueError, match="dtype, device"):
        models.load_denoiser(unet(), device="cpu")
    with pytest.raises(ValueError, match="device"):
        models.load_denoiser(tmp_path, device="nowhere")


@torch.no_grad()
def test_the_trained_one_denoises() -> None:
    denoiser = models.load_denoiser(testbed.load_denoiser())
    clean = testbed.subject_trial(0).pictures[:4].float() * 2 - 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for t, share in ((20, 0.3), (100, 0.15)):
        noisy = denoiser.schedule.add_noise(clean, noise, t)
        error = (denoiser(noisy, torch.tensor(t)).x0 - clean).square().mean()
        assert error < share * (noisy - clean).square().mean()
