from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

from pumice import purify, testbed
from pumice.models import UnsupportedModelError
from pumice.models.upscaler import load_upscaler
from pumice.purify.upscaling import Upscaling
from pumice.testbed.tiny import ddim_scheduler

FEW: dict[str, Any] = {"num_inference_steps": 3}


def tiny_upscaler(seed: int = 0) -> Any:
    """The upscaler's parts and wiring, with random weights and texts of the tiny Stable Diffusion."""
    texts = testbed.tiny_pipeline("sd1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            latent_channels=4,
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            scaling_factor=0.08333,
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=7,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=32,
            attention_head_dim=4,
            num_class_embeds=1000,
        )
    pipe = StableDiffusionUpscalePipeline(
        vae=vae.eval(),
        text_encoder=texts.text_encoder,
        tokenizer=texts.tokenizer,
        unet=unet.eval(),
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        scheduler=ddim_scheduler("v_prediction"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_upscaler()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 12, generator=torch.Generator().manual_seed(0))


def test_it_is_the_pipelines_own_picture(pipe: Any, images: Tensor) -> None:
    settings = {"noise_level": 20, "num_inference_steps": 4, "guidance_scale": 5.0}
    expected = pipe(
        prompt=["a photo of a cat"],
        negative_prompt=["a dog"],
        image=images[:1],
        generator=[torch.Generator().manual_seed(7)],
        output_type="pt",
        **settings,
    ).images
    found = purify.noisy_upscaling(
        images[:1],
        pipe,
        "a photo of a cat",
        noise=0,
        negative_prompt="a dog",
        output="upscaled",
        seed=7,
        **settings,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_picture_is_the_same_alone_and_again(pipe: Any, images: Tensor) -> None:
    together = purify.noisy_upscaling(images, pipe, ["a cat", "a dog", "a cat"], seed=3, **FEW)
    again = purify.noisy_upscaling(images, pipe, ["a cat", "a dog", "a cat"], seed=3, **FEW)
    assert torch.equal(together, again)
    for number, text in enumerate(["a cat", "a dog", "a cat"]):
        alone = purify.noisy_upscaling(images[number : number + 1], pipe, text, seed=3 + number, **FEW)
        torch.testing.assert_close(alone[0], together[number], rtol=0, atol=1e-5)
    other = purify.noisy_upscaling(images, pipe, ["a cat", "a dog", "a cat"], seed=4, **FEW)
    assert (other - together).abs().mean() > 0.01


def test_noise_is_of_the_size_that_it_should_have(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    preprocess = pipe.image_processor.preprocess
    monkeypatch.setattr(
        pipe.image_processor, "preprocess", lambda image: seen.append(image) or preprocess(image)
    )
    grey = torch.full((1, 3, 64, 64), 0.5)
    purify.noisy_upscaling(grey, pipe, noise=0.05, num_inference_steps=1)
    purify.noisy_upscaling(grey, pipe, noise=1, num_inference_steps=1)
    assert (seen[0] - grey).std().item() == pytest.approx(0.05, rel=0.03)
    assert abs((seen[0] - grey).mean().item()) < 0.003
    assert seen[1].min() == 0 and seen[1].max() == 1  # cut to the range of pictures


def calls(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the denoiser from now on."""
    rows: list[int] = []
    real = pipe.unet.forward

    def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        return real(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    return rows


def test_a_branch_that_changes_nothing_is_left_out(
    pipe: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = calls(pipe, monkeypatch)
    purify.noisy_upscaling(images, pipe, **FEW)
    purify.noisy_upscaling(images, pipe, "a cat", negative_prompt="a cat", **FEW)
    purify.noisy_upscaling(images, pipe, "a cat", guidance_scale=1, **FEW)
    assert rows == [3] * 9
    purify.noisy_upscaling(images, pipe, ["", "", "a cat"], **FEW)
    assert rows[9:] == [6] * 3


def test_sizes_that_the_network_does_not_take(pipe: Any) -> None:
    image = torch.rand(1, 3, 13, 19, generator=torch.Generator().manual_seed(1))
    assert purify.noisy_upscaling(image, pipe, **FEW).shape == image.shape
    large = purify.noisy_upscaling(image, pipe, output="upscaled", **FEW)
    assert large.shape == (1, 3, 52, 76)
    # the mirror image is outside: what is inside is that of a picture continued so
    whole = torch.cat((image, image[:, :, -3:].flip(2)), dim=2)
    whole = torch.cat((whole, whole[..., -1:].flip(3)), dim=3)
    continued = purify.noisy_upscaling(whole, pipe, output="upscaled", noise=0, **FEW)
    cut = purify.noisy_upscaling(image, pipe, output="upscaled", noise=0, **FEW)
    torch.testing.assert_close(cut, continued[..., :52, :76], rtol=0, atol=1e-5)


def test_files_keep_what_they_say(pipe: Any, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (20, 12, 4), dtype=torch.uint8, generator=draw).numpy()
    image = Image.fromarray(pixels)
    image.info["dpi"] = (300.0, 300.0)
    image.convert("RGB").resize((8, 8)).save(tmp_path / "other.png")
    first, second = purify.noisy_upscaling([image, tmp_path / "other.png"], pipe, **FEW)
    assert (first.size, first.mode, second.size, second.mode) == ((12, 20), "RGBA", (8, 8), "RGB")
    assert first.getchannel("A").tobytes() == image.getchannel("A").tobytes()
    assert first.info["dpi"] == (300.0, 300.0)
    with pytest.raises(ValueError, match="output: got 'upscaled' for PIL"):
        purify.noisy_upscaling(image, pipe, output="upscaled", **FEW)


def state(pipe: Any) -> Any:
    training = [part.training for part in (pipe.unet, pipe.vae, pipe.text_encoder)]
    gradients = {parameter.requires_grad for parameter in pipe.unet.parameters()}
    bar = dict(pipe._progress_bar_config)
    schedule = (pipe.scheduler.num_inference_steps, pipe.scheduler.timesteps.tolist())
    return training, gradients, bar, schedule, pipe.vae.dtype, dict(pipe.config), pipe.safety_checker


def test_the_pipeline_stays_as_it_is(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_upscaler()
    pipe.set_progress_bar_config(desc="mine")
    pipe.scheduler.set_timesteps(5)
    pipe.safety_checker = checker = object()
    pipe.unet.train()
    pipe.to(torch.float16)  # its autoencoder is widened to decode
    before = state(pipe)
    made = purify.noisy_upscaling(images, pipe, **FEW)
    assert made.isfinite().all()
    assert state(pipe) == before and pipe.safety_checker is checker

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("broken")

    monkeypatch.setattr(pipe.vae, "decode", broken)
    with pytest.raises(KeyError, match="broken"):
        purify.noisy_upscaling(images, pipe, **FEW)
    assert state(pipe) == before


def test_other_schedulers_and_dtypes_draw_each_picture_by_itself(images: Tensor) -> None:
    pipe = tiny_upscaler().to(torch.bfloat16)
    assert purify.noisy_upscaling(images[:1], pipe, **FEW).dtype == torch.float32
    pipe = tiny_upscaler()
    ancestral = DDPMScheduler.from_config(pipe.scheduler.config)
    for scheduler in (EulerDiscreteScheduler.from_config(pipe.scheduler.config), ancestral):
        pipe.scheduler = scheduler
        together = purify.noisy_upscaling(images, pipe, **FEW)
        alone = purify.noisy_upscaling(images[1:2], pipe, seed=1, **FEW)
        torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-5)


def test_out_of_memory_halves_the_batch(pipe: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = purify.noisy_upscaling(images, pipe, batch_size=1, **FEW)
    real, rows = pipe.unet.forward, []

    def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(sample))
        if len(sample) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    assert torch.equal(purify.noisy_upscaling(images, pipe, batch_size=3, **FEW), expected)
    assert rows == [3, 2] + [1] * 9


def test_large_pictures_go_in_smaller_batches(pipe: Any) -> None:
    settings: dict[str, Any] = {"noise_level": 20, "num_inference_steps": 2, "guidance_scale": 1}
    small, large = torch.zeros(3, 16, 16), torch.zeros(3, 160, 256)
    assert Upscaling(pipe, 2, "", **settings).budget([small, small]).rows == 16
    assert Upscaling(pipe, 2, "", **settings).budget([small, large]).rows == 6
    assert Upscaling(pipe, 1, "", **settings).budget([torch.zeros(3, 999, 999)]).rows == 1
    assert Upscaling(pipe, 2, "", batch_size=9, **settings).budget([small, large]).rows == 9


def test_a_folder_is_opened(pipe: Any, images: Tensor, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "upscaler")
    opened = purify.noisy_upscaling(images, tmp_path / "upscaler", **FEW)
    torch.testing.assert_close(opened, purify.noisy_upscaling(images, pipe, **FEW))
    testbed.tiny_pipeline("sd1").save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match=r"upscaler: .* is a StableDiffusionPipeline"):
        load_upscaler(tmp_path / "other")
    with pytest.raises(ValueError, match="is not a diffusers folder"):
        load_upscaler(tmp_path)
    with pytest.raises(ValueError, match=r"expected a path; use pipe\.to"):
        load_upscaler(pipe, dtype=torch.float16)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"noise": 25.5}, "noise: got 25.5"),
        ({"noise": float("nan")}, "noise: got nan"),
        ({"noise_level": 351}, "noise_level: got 351, expected at most 350"),
        ({"noise_level": -1}, "noise_level: got -1"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps: got 1001, expected at most 1000"),
        ({"guidance_scale": -1.0}, "guidance_scale: got -1.0"),
        ({"prompt": ["a", "b"]}, "prompt: got 2, expected one, or one for each of 3"),
        ({"prompt": 5}, "prompt: got a int"),
        ({"negative_prompt": 5}, "negative_prompt: got a int"),
        ({"output": "large"}, "output: got 'large'"),
        ({"seed": [1, 2]}, "seed: got 2"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_bad_settings(pipe: Any, images: Tensor, settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said) as found:
        purify.noisy_upscaling(images, pipe, **settings)
    assert "\n" not in str(found.value)


def test_seeds_may_be_of_any_size(pipe: Any, images: Tensor) -> None:
    found = purify.noisy_upscaling(images[:2], pipe, seed=2**64 - 1, **FEW)
    alone = purify.noisy_upscaling(images[1:2], pipe, seed=2**64, **FEW)
    assert (found[1:] - alone).abs().mean() < 1e-5


def test_other_models_are_refused(pipe: Any, images: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="expected a StableDiffusionUpscalePipeline"):
        purify.noisy_upscaling(images, testbed.tiny_pipeline("sd1"))
    with pytest.raises(TypeError, match="upscaler: got a int"):
        purify.noisy_upscaling(images, 3)
    other = tiny_upscaler()
    other.vae_scale_factor = 8
    with pytest.raises(UnsupportedModelError, match="makes 8 times the sides"):
        purify.noisy_upscaling(images, other)
