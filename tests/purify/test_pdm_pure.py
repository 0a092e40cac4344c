from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, IFSuperResolutionPipeline, UNet2DConditionModel, UNet2DModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from pumice import purify, testbed
from pumice.models import PixelDenoiser, UnsupportedModelError
from pumice.models.deep_floyd import DeepFloyd
from purify.test_noisy_upscaling import tiny_upscaler

TAKEN = [99, 88, 77, 66, 55, 44, 33, 22, 11, 0]


def denoiser() -> PixelDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16,
            out_channels=6,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
    return PixelDenoiser(unet.eval(), DDPMScheduler(variance_type="learned_range"))


def deep_floyd() -> Any:
    """The second stage's parts and wiring, with random weights: 32 px, small pictures of 8."""
    texts = testbed.tiny_pipeline("sd3")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=32,
            in_channels=6,
            out_channels=6,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            norm_num_groups=8,
            cross_attention_dim=16,
            encoder_hid_dim=32,
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            class_embed_type="timestep",
            resnet_time_scale_shift="scale_shift",
            resnet_skip_time_act=True,
            act_fn="gelu",
        )
    pipe = IFSuperResolutionPipeline(
        tokenizer=texts.tokenizer_3,
        text_encoder=texts.text_encoder_3,
        unet=unet.eval(),
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model() -> PixelDenoiser:
    return denoiser()


@pytest.fixture(scope="module")
def pipe() -> Any:
    return deep_floyd()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))


class Calls(list[tuple[Tensor, Tensor, dict[str, Any]]]):
    """What a network is called with: sample, timestep, and all else."""

    def __init__(self, unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        real = unet.forward

        def forward(sample: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.append((sample.clone(), timestep, kwargs))
            return real(sample, timestep, *args, **kwargs)

        monkeypatch.setattr(unet, "forward", forward)


def test_the_steps_and_the_noise(model: PixelDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(model.unet, monkeypatch)
    grey = torch.full((4, 3, 64, 64), 0.5)
    for less, noised in ((0, 99), (5, 44)):
        calls.clear()
        purify.pdm_pure(grey, model, less_qsample_steps=less)
        assert [int(timestep) for _, timestep, _ in calls] == TAKEN
        sigma = (1 - model.schedule.alphas_cumprod[noised]).sqrt().item()
        assert calls[0][0].shape == (4, 3, 16, 16)
        assert calls[0][0].std().item() == pytest.approx(sigma, rel=0.05)
    calls.clear()
    purify.pdm_pure(grey, model, t=7, num_inference_steps=1)
    assert [int(timestep) for _, timestep, _ in calls] == [6]


def test_a_picture_is_the_same_alone_and_again(model: PixelDenoiser, pipe: Any, images: Tensor) -> None:
    for network, settings in ((model, {}), (pipe, {"num_inference_steps": 3})):
        together = purify.pdm_pure(images, network, seed=4, **settings)
        assert torch.equal(together, purify.pdm_pure(images, network, seed=4, **settings))
        assert together.shape == images.shape
        alone = purify.pdm_pure(images[2:], network, seed=6, **settings)
        torch.testing.assert_close(alone[0], together[2], rtol=0, atol=1e-5)
        parts = purify.pdm_pure(images, network, seed=4, batch_size=2, **settings)
        torch.testing.assert_close(parts, together, rtol=0, atol=1e-5)


def test_an_upscaler_comes_after_it(model: PixelDenoiser, images: Tensor) -> None:
    upscaler = tiny_upscaler()
    found = purify.pdm_pure(images[:1], model, upscaler, prompt="a cat", num_inference_steps=2, seed=9)
    small = purify.pdm_pure(
        interpolate(images[:1], (16, 24), mode="bicubic", antialias=True).clamp(0, 1),
        model,
        num_inference_steps=2,
        seed=9,
    )
    large = upscaler(
        prompt=["a cat"],
        image=small,
        num_inference_steps=50,
        guidance_scale=4,
        noise_level=20,
        generator=[torch.Generator().manual_seed(9)],
        output_type="pt",
    ).images
    assert large.shape == (1, 3, 64, 96)
    expected = interpolate(large, (32, 48), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_files_keep_what_they_say(model: PixelDenoiser, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    image = Image.fromarray(torch.randint(256, (20, 40, 4), dtype=torch.uint8, generator=draw).numpy())
    image.info["dpi"] = (300.0, 300.0)
    image.convert("RGB").resize((9, 9)).save(tmp_path / "other.png")
    first, second = purify.pdm_pure([image, tmp_path / "other.png"], model)
    assert (first.size, first.mode, second.size, second.mode) == ((40, 20), "RGBA", (9, 9), "RGB")
    assert first.getchannel("A").tobytes() == image.getchannel("A").tobytes()
    assert first.info["dpi"] == (300.0, 300.0)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_deep_floyd_sees_and_says_what_its_pipeline_does(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, guidance_scale: float
) -> None:
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    x, noise = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (4, 5))
    small = interpolate(pictures, (8, 8), mode="bicubic", antialias=True).clamp(-1, 1)
    calls = Calls(pipe.unet, monkeypatch)
    given = iter((x, noise))
    monkeypatch.setattr(
        "diffusers.pipelines.deepfloyd_if.pipeline_if_superresolution.randn_tensor",
        lambda *args, **kwargs: next(given),
    )
    pipe(
        ["a picture"] * 2,
        image=small,
        timesteps=[60, 0],
        guidance_scale=guidance_scale,
        noise_level=250,
        clean_caption=False,
        output_type="pt",
    )
    adapter = DeepFloyd(pipe, prompt="a picture", guidance_scale=guidance_scale, noise_level=250)
    adapter.see(pictures, noise)
    with torch.no_grad():
        denoised = adapter(x, torch.tensor(60))
    (theirs, _, inputs), (ours, timestep, mine) = calls[0], calls[-1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert int(timestep) == 60 and mine["class_labels"].tolist() == inputs["class_labels"].tolist()
    torch.testing.assert_close(mine["encoder_hidden_states"], inputs["encoder_hidden_states"])
    # the pipeline's guidance and DDPM's own x0
    with torch.no_grad():
        output = pipe.unet(theirs, 60, **{**inputs, "return_dict": False})[0]
    epsilon, variance = output.chunk(2, dim=1)
    if guidance_scale > 1:
        away, to = epsilon.chunk(2)
        epsilon, variance = away + guidance_scale * (to - away), variance.chunk(2)[1]
    step = pipe.scheduler.step(torch.cat((epsilon, variance), dim=1), 60, x)
    torch.testing.assert_close(denoised.x0, step.pred_original_sample, rtol=0, atol=1e-4)
    torch.testing.assert_close(denoised.share, (variance + 1) / 2)


def test_each_picture_sees_itself(pipe: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(pipe.unet, monkeypatch)
    shades = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    purify.pdm_pure(shades, pipe, num_inference_steps=2, noise_level=0, batch_size=2, guidance_scale=1)
    seen = [sample[:, 3:].mean((1, 2, 3)) for sample, _, _ in calls]
    expected = [[-0.8, 0.0], [-0.8, 0.0], [0.8], [0.8]]
    for found, shade in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, torch.tensor(shade), rtol=0, atol=0.02)


def test_deep_floyd_stays_as_it_is_and_opens(pipe: Any, images: Tensor, tmp_path: Path) -> None:
    pipe.unet.train()
    made = purify.pdm_pure(images[:1], pipe, num_inference_steps=2)
    assert pipe.unet.training and all(each.requires_grad for each in pipe.unet.parameters())
    assert not pipe.text_encoder.training
    pipe.unet.eval()
    pipe.save_pretrained(tmp_path)
    opened = purify.pdm_pure(images[:1], tmp_path, num_inference_steps=2)
    torch.testing.assert_close(opened, made, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"t": 0}, "t: got 0"),
        ({"t": 1001}, "t: got 1001, expected 1 to 1000"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"t": 5, "num_inference_steps": 6}, "num_inference_steps: got 6, expected at most 5"),
        ({"less_qsample_steps": 10}, "less_qsample_steps: got 10, expected at most 9"),
        ({"less_qsample_steps": -1}, "less_qsample_steps: got -1"),
        ({"noise_level": -1}, "noise_level: got -1"),
        ({"prompt": None}, "prompt: got a NoneType"),
        ({"guidance_scale": float("inf")}, "guidance_scale: got inf"),
        ({"seed": [1]}, "seed: got 1"),
    ],
)
def test_bad_settings(model: PixelDenoiser, images: Tensor, settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said) as found:
        purify.pdm_pure(images, model, **settings)
    assert "\n" not in str(found.value)


def test_other_models_are_refused(model: PixelDenoiser, pipe: Any, images: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="which works in latents"):
        purify.pdm_pure(images, testbed.tiny_pipeline("sd1"))
    with pytest.raises(TypeError, match="denoiser: got a int"):
        purify.pdm_pure(images, 3)
    with pytest.raises(UnsupportedModelError, match="expected a StableDiffusionUpscalePipeline"):
        purify.pdm_pure(images, model, testbed.tiny_pipeline("sd1"))
    with pytest.raises(ValueError, match="noise_level: got 1000, expected 0 to 999"):
        purify.pdm_pure(images, pipe, noise_level=1000)
    parts = {**pipe.components, "text_encoder": None}
    with pytest.raises(UnsupportedModelError, match="no text encoder"):
        purify.pdm_pure(images, IFSuperResolutionPipeline(**parts, requires_safety_checker=False))


@torch.no_grad()
def test_the_variance_of_deep_floyd_is_its_schedulers(pipe: Any, images: Tensor) -> None:
    def of(variance: str) -> Any:
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type=variance)
        other = IFSuperResolutionPipeline(
            **{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False
        )
        model = DeepFloyd(other, prompt="a", guidance_scale=1.0, noise_level=9)
        model.see(images, torch.zeros_like(images))
        return model(images, torch.tensor(9)).share

    assert of("fixed_small") is None and bool((of("fixed_large") == 1).all())
    learned = of("learned_range")
    assert learned.shape == images.shape and learned.std() > 0
    with pytest.raises(UnsupportedModelError, match="variance_type is 'learned'"):
        of("learned")


def test_the_trained_one_cleans_pictures() -> None:
    trial = testbed.subject_trial(0)
    clean = trial.pictures[:4].float()
    signs = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).sign()
    protected = (clean + 8 / 255 * signs).clamp(0, 1)
    purified = purify.pdm_pure(protected, testbed.load_denoiser(), t=20)
    assert trial.quality(protected).mean() < 0.25
    assert trial.quality(purified).mean() > 0.5
    assert trial.identity(purified).mean() > 0.8
