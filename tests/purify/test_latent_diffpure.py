"""DiffPure in latents: against a plain loop with diffusers' own scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from PIL import Image
from torch import Tensor

from pumice import purify, testbed
from pumice.models import DiffusionModel, load
from pumice.models.draws import Draws
from pumice.testbed import world
from pumice.testbed.tiny import tiny_pipeline


def pictures(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def rows_of(pipe: Any) -> list[int]:
    seen: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    return seen


def plain(
    pipe: Any, image: Tensor, prompt: str, negative: str, t: int, scale: float, seed: int, patch: Any
) -> Tensor:
    """One picture (1, 3, H, W) with both branches, steps by DDPMScheduler."""
    model, draws = load(pipe), Draws([f"{seed}/0"], torch.device("cpu"))
    steps = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_small", clip_sample=False)
    shape = model.latent_shape(*image.shape[2:])
    posterior = pipe.vae.encode(image * 2 - 1).latent_dist
    z = posterior.mean + posterior.std * draws.normal([0], "posterior", 0, shape)
    z = z * pipe.vae.config.scaling_factor
    x = steps.add_noise(z, draws.normal([0], "start", 0, shape), torch.tensor([t]))
    none = model.encode_prompt(negative) if negative else model.unconditional()
    embeds = [none, model.encode_prompt(prompt)]
    for step, timestep in enumerate(range(t, -1, -1)):
        away, to = (model.predict(x, timestep, each) for each in embeds)
        noise = draws.normal([0], f"step {step}", 0, shape)
        patch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, noise=noise, **__: noise)
        x = steps.step(away + scale * (to - away), timestep, x).prev_sample
    return (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "prompt"),
    [(family, prompt) for family in ("sd1", "sd2", "sdxl") for prompt in ("", "a small cat")],
)
def test_it_is_the_plain_loop(family, prompt, monkeypatch):
    """Without a prompt, too, where the plain loop guides and this one leaves the branch out.

    Not so for SDXL, whose pipeline has zeros for no prompt.
    """
    pipe, images = tiny_pipeline(family), pictures()
    found = purify.latent_diffpure(images, pipe, prompt, t=5, guidance_scale=3, seed=5)
    expected = [plain(pipe, images[i : i + 1], prompt, "", 5, 3, 5 + i, monkeypatch) for i in range(2)]
    torch.testing.assert_close(
        found, torch.cat(expected), rtol=0, atol=1e-3
    )  # DDPMScheduler's betas: float32


@pytest.mark.parametrize(
    ("how", "passes", "rows"),
    [
        ({}, 11, 2),
        ({"prompt": "a cat"}, 11, 4),
        ({"prompt": "a cat", "negative_prompt": "a cat"}, 11, 2),
        ({"prompt": "a cat", "guidance_scale": 1}, 11, 2),
        ({"prompt": "a cat", "sampler": "dpmsolver++", "num_inference_steps": 4}, 4, 4),
        ({"sampler": "one_shot"}, 1, 2),
    ],
)
def test_what_it_costs(how, passes, rows):
    pipe = tiny_pipeline("sd1")
    seen = rows_of(pipe)
    purify.latent_diffpure(pictures(), pipe, t=10, **how)
    assert seen == [rows] * passes


def test_a_batch_is_its_pictures_alone():
    pipe, images, how = tiny_pipeline("sd2"), pictures(4), {"t": 4, "prompt": "a cat"}
    batch = purify.latent_diffpure(images, pipe, seed=[3, 9, 4, 1], batch_size=3, **how)
    alone = [
        purify.latent_diffpure(images[i : i + 1], pipe, seed=s, **how) for i, s in enumerate([3, 9, 4, 1])
    ]
    torch.testing.assert_close(batch, torch.cat(alone), rtol=0, atol=1e-4)
    assert (batch - purify.latent_diffpure(images, pipe, seed=20, **how)).abs().max() > 0.01


def test_running_out_of_memory_halves_the_batch(monkeypatch):
    pipe, images, sizes, predict = tiny_pipeline("sd1"), pictures(4), [], DiffusionModel.predict
    expected = purify.latent_diffpure(images, pipe, t=2)

    def limited(self: DiffusionModel, x: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, x, *rest)

    monkeypatch.setattr(DiffusionModel, "predict", limited)
    torch.testing.assert_close(purify.latent_diffpure(images, pipe, t=2), expected, rtol=0, atol=1e-4)
    assert sizes == [4] + [2] * 6


def test_files_meet_the_model_resized_or_as_they_are():
    pipe, shapes = tiny_pipeline("sd1"), []
    pipe.unet.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape[2:])))
    image = Image.new("RGB", (101, 47), (200, 40, 90))
    for size, expected in (("resize", (16, 34)), ("native", (24, 51))):
        found = purify.latent_diffpure(image, pipe, t=3, sampler="one_shot", size=size)
        assert isinstance(found, Image.Image) and found.size == (101, 47)
        assert shapes[-1] == expected


def test_tensors_are_taken_as_they_are():
    pipe = tiny_pipeline("sd1")
    found = purify.latent_diffpure(pictures(1, 24, 48).half(), pipe, t=3, sampler="one_shot")
    assert found.shape == (1, 3, 24, 48) and found.dtype == torch.float16
    with pytest.raises(ValueError, match=r"^images: got 32 x 33 pixels, expected multiples of 2"):
        purify.latent_diffpure(pictures(1, 32, 33), pipe)


def test_pictures_stay_themselves():
    pipe = testbed.load()
    clean = torch.stack([torch.from_numpy(world.subject(index, 0)) for index in range(3)])
    found = purify.latent_diffpure(clean, pipe, sampler="dpmsolver++", num_inference_steps=5)
    apart = (found[:, None] - clean[None]).square().mean((2, 3, 4))
    assert (apart.diagonal() < 0.5 * (apart + torch.eye(3)).min(1).values).all()


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_pipeline_is_left_as_it_was(error, monkeypatch):
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    pipe.vae.requires_grad_(False)
    if error:

        def fail(*_: object) -> None:
            raise error("on the way")

        monkeypatch.setattr(DiffusionModel, "predict", fail)
        with pytest.raises(error, match="on the way"):
            purify.latent_diffpure(pictures(), pipe, "a cat", t=1)
    else:
        purify.latent_diffpure(pictures(), pipe, "a cat", t=1)
    assert all(module.training for module in pipe.unet.modules()) and not pipe.vae.training
    assert all(p.requires_grad for p in pipe.unet.parameters())
    assert not any(p.requires_grad for p in pipe.vae.parameters())


def test_half_precision_networks():
    pipe = testbed.load(dtype=torch.bfloat16)
    clean = torch.from_numpy(world.subject(0, 0))[None]
    how = {"sampler": "dpmsolver++", "num_inference_steps": 3, "t": 100}
    found, expected = (purify.latent_diffpure(clean, each, **how) for each in (pipe, testbed.load()))
    assert found.dtype == torch.float32 and (found - expected).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"t": 1000}, ValueError, "t: got timestep 1000, expected 0 to 999"),
        ({"t": -1}, ValueError, "t: got -1, expected at least 0"),
        ({"guidance_scale": -1}, ValueError, "guidance_scale: got -1"),
        ({"prompt": None}, TypeError, "prompt: got a NoneType"),
        ({"negative_prompt": 3}, TypeError, "negative_prompt: got a int"),
        ({"sampler": "ddim"}, ValueError, "sampler: got 'ddim'"),
        ({"strength": 0.3}, TypeError, "strength"),
        ({"seed": [1]}, ValueError, "seed: got 1, expected one, or one for each of 2 pictures"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        purify.latent_diffpure(pictures(), tiny_pipeline("sd1"), **arguments)


def test_bad_size_of_a_tensor():
    with pytest.raises(ValueError, match="size: got 'bogus', expected one of resize, native"):
        purify.latent_diffpure(pictures(), tiny_pipeline("sd1"), size="bogus")


def test_bad_size_of_a_file():
    with pytest.raises(ValueError, match="size: got 'tiles', expected one of resize, native"):
        purify.latent_diffpure(Image.new("RGB", (32, 32)), tiny_pipeline("sd1"), size="tiles")
