from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from torch import Tensor

from pumice import testbed
from pumice.models import load
from pumice.models.draws import Draws
from pumice.protect.glaze import _gradient, _in_style, contrast_masked_error, glaze
from pumice.protect.pictures import Pictures
from pumice.protect.random_noise import random_noise
from pumice.testbed import world
from pumice.testbed.tiny import tiny_pipeline


def images(count: int, *, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipe():
    return testbed.load()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.stack([torch.from_numpy(world.subject(index, 0)) for index in range(2)])


@pytest.fixture(scope="module")
def targets() -> Tensor:
    scenes = [world.Scene("heart", "red", "cave", style) for style in ("okoro", "tanaka")]
    drawn = [world.draw(scene, np.random.default_rng(7)) for scene in scenes]
    return torch.stack([torch.from_numpy(picture) for picture in drawn])


@torch.no_grad()
def apart(pipe: object, a: Tensor, b: Tensor) -> Tensor:
    model = load(pipe)
    return (model.encode_image(a) - model.encode_image(b)).square().mean((1, 2, 3))


def test_an_error_on_an_even_surface_and_one_in_texture():
    even = torch.full((1, 3, 32, 32), 0.5)
    # two values by turns: the variance is c^2 wherever 7 x 7 pixels are, up to the odd one of 49
    sign = 1 - 2 * (torch.arange(32)[:, None] + torch.arange(32)).remainder(2)
    texture = even + 0.2 * sign
    error = 0.02 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean = error.square().mean()
    torch.testing.assert_close(contrast_masked_error(even + error, even)[0], mean / 0.01)
    masked = contrast_masked_error(texture + error, texture)[0]
    torch.testing.assert_close(masked, mean / (0.01 + 0.04), rtol=0.01, atol=0)
    assert contrast_masked_error(texture, texture) == 0
    twice = contrast_masked_error(torch.cat([even, texture]), torch.cat([texture, texture]))
    assert twice[1] == 0 and twice[0] > 0


def test_the_error_is_that_of_its_formula():
    x, clean = images(2, seed=1)[:, :, :12, :9].double(), images(2)[:, :, :12, :9].double()
    found = contrast_masked_error(x, clean)
    for image, truth, mine in zip(x.numpy(), clean.numpy(), found, strict=True):
        weighed = np.empty((3, 12, 9))
        for i in range(12):
            for j in range(9):
                window = truth[:, max(i - 3, 0) : i + 4, max(j - 3, 0) : j + 4]
                variance = window.var(axis=(1, 2)).mean()
                weighed[:, i, j] = (image - truth)[:, i, j] ** 2 / (variance + 0.01)
        assert mine.item() == pytest.approx(weighed.mean(), rel=1e-9)
    leaf = x[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda each: contrast_masked_error(each, clean[:1]), leaf)


def test_the_gradient_is_that_of_the_loss():
    pipe = tiny_pipeline("sd1")
    pipe.vae.double()
    model = load(pipe)
    clean, y, x = (images(2, seed=seed).double() for seed in range(3))
    x = (clean + 0.02 * (x - 0.5)).clamp(0, 1)
    allowed = torch.ones(2, 1, 32, 32, dtype=torch.float64)
    allowed[:, :, :10] = 0
    p = contrast_masked_error(x, clean).mean().item()  # one picture is beyond it, one is not
    with model.frozen(data_gradient=True), torch.no_grad():
        z_y = model.encode_image(y)
        found = _gradient([model], contrast_masked_error, p, 30.0, False)(x, clean, allowed, z_y)
    leaf = x.clone().requires_grad_()
    z, z_y = (pipe.vae.encode(each * 2 - 1).latent_dist.mean for each in (leaf, y))
    over = (contrast_masked_error(leaf, clean) - p).clamp(min=0)
    ((z - z_y).square().mean((1, 2, 3)).sum() + 30 * over.sum()).backward()
    assert (over > 0).sum() == 1
    torch.testing.assert_close(found, leaf.grad * allowed, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_batch_is_its_pictures_alone(family):
    pipe, clean, y = tiny_pipeline(family), images(3), images(3, seed=1)
    batch = glaze(clean, pipe, y, steps=3, seed=5)
    alone = [glaze(clean[i : i + 1], pipe, y[i : i + 1], steps=3, seed=5 + i) for i in range(3)]
    for other in (torch.cat(alone), glaze(clean, pipe, y, steps=3, seed=[5, 6, 7], batch_size=2)):
        # where a gradient is next to nothing, Adam's first steps are as long as anywhere
        assert (batch - other).abs().gt(1e-4).double().mean() < 2e-3
    torch.testing.assert_close(
        batch, glaze(clean, pipe, y, steps=3, seed=5, recompute=True), rtol=0, atol=1e-5
    )
    assert not torch.equal(batch, glaze(clean, pipe, y, steps=3, seed=50))


def test_latents_go_to_the_targets_at_the_price_of_a_distance(pipe, pictures, targets):
    before = apart(pipe, pictures, targets)
    found = {p: glaze(pictures, pipe, targets, p=p, steps=60) for p in (0.02, 0.1)}
    for p, protected in found.items():
        assert 0 <= protected.min() and protected.max() <= 1
        error = contrast_masked_error(protected, pictures)
        assert (error < 1.2 * p).all() and (error > 0.5 * p).all()  # used up, and hardly more
    near, far = (apart(pipe, each, targets) for each in found.values())
    assert (far < near).all() and (near < 0.8 * before).all()
    noisy = random_noise(pictures, eps=(found[0.1] - pictures).square().mean().sqrt().item())
    assert (far < 0.7 * apart(pipe, noisy, targets)).all()


def test_a_free_distance_costs_nothing(pipe, pictures, targets):
    bound = glaze(pictures, pipe, targets, p=0.01, steps=15)
    free = glaze(pictures, pipe, targets, p=0.01, steps=15, alpha=0)
    assert (contrast_masked_error(free, pictures) > 2 * contrast_masked_error(bound, pictures)).all()
    assert (apart(pipe, free, targets) < apart(pipe, bound, targets)).all()


def test_another_distance_is_obeyed(pipe, pictures, targets):
    def error(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3)).sqrt()

    found = glaze(pictures, pipe, targets, distance=error, p=0.03, steps=30)
    assert (error(found, pictures) < 0.033).all()
    assert (apart(pipe, found, targets) < 0.95 * apart(pipe, pictures, targets)).all()


def test_a_style_is_what_diffusers_img2img_draws(monkeypatch):
    pipe = tiny_pipeline("sd1")
    model, clean = load(pipe), images(2)
    draws = Draws(["8/0", "9/0"], model.device)
    found = _in_style("a red painting", Pictures(clean, [model]), model, 0.3, draws)
    img2img = StableDiffusionImg2ImgPipeline(
        **pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)}, requires_safety_checker=False
    )
    img2img.set_progress_bar_config(disable=True)
    noise = draws.normal([0, 1], "style", 0, model.latent_shape(32, 32))
    monkeypatch.setattr(sys.modules[type(img2img).__module__], "randn_tensor", lambda *_, **__: noise)
    with torch.no_grad():
        z = model.encode_image(clean)  # latents are taken as they are, without a sample of a posterior
    how = {"strength": 0.3, "num_inference_steps": 50, "guidance_scale": 7.5, "output_type": "pt"}
    expected = img2img(["a red painting"] * 2, z, **how).images
    torch.testing.assert_close(torch.stack(found), expected, rtol=0, atol=1e-3)


def test_a_style_is_as_good_as_its_pictures(monkeypatch):
    pipe, clean = tiny_pipeline("sd1"), images(2)
    model = load(pipe)
    drawn = _in_style("a painting", Pictures(clean, [model]), model, 0.1, Draws(["3/0", "4/0"], model.device))
    expected = glaze(clean, pipe, torch.stack(drawn), steps=2, seed=3)
    assert torch.equal(glaze(clean, pipe, style="a painting", strength=0.1, steps=2, seed=3), expected)


def test_outside_the_mask_nothing_changes():
    pipe, clean = tiny_pipeline("sd1"), images(1)
    mask = torch.zeros(32, 32)
    mask[:, 8:20] = 1
    change = glaze(clean, pipe, images(1, seed=1), steps=3, mask=mask) - clean
    assert not change[..., mask == 0].any()
    assert (change[..., mask == 1] != 0).double().mean() > 0.9


def test_files_of_any_size(tmp_path):
    rng, pipe = np.random.default_rng(0), tiny_pipeline("sd1")
    for name, size in (("a", (45, 70)), ("b", (33, 32)), ("y_a", (45, 70)), ("y_b", (33, 32))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    paths, ys = ([tmp_path / f"{start}{name}.png" for name in "ab"] for start in ("", "y_"))
    found = glaze(paths, pipe, ys, steps=2, size="native")
    assert [picture.size for picture in found] == [(70, 45), (32, 33)]
    alone = glaze(paths[1], pipe, ys[1], steps=2, size="native", seed=1)
    assert np.abs(np.array(alone, int) - np.array(found[1], int)).max() <= 1


def test_an_autoencoder_that_overflows_is_refused():
    pipe = tiny_pipeline("sd1")
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(torch.inf)
    with pytest.raises(ValueError, match="pipe: its autoencoder gives latents that are not finite"):
        glaze(images(1), pipe, images(1, seed=1), steps=1)


def state(pipe: object) -> list[object]:
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [pipe.scheduler.timesteps.tolist(), pipe.scheduler.num_inference_steps] + [
        (
            name,
            module.training,
            "forward" in vars(module),
            [(p.requires_grad, p.sum().item()) for p in module.parameters(recurse=False)],
        )
        for part in parts
        for name, module in part.named_modules()
    ]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_pipeline_is_left_as_it_was(error):
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    pipe.vae.requires_grad_(False)
    before = state(pipe)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        if error:
            raise error("on the way")
        return (a - b).square().mean((1, 2, 3))

    def run() -> None:
        glaze(images(1), pipe, style="a painting", strength=0.1, distance=distance, steps=2)

    if error:
        with pytest.raises(error, match="on the way"):
            run()
    else:
        run()
    assert state(pipe) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": None}, ValueError, "target, style: expected one of them"),
        ({"style": "a painting"}, ValueError, "target, style: expected one of them"),
        ({"target": None, "style": 3}, TypeError, "style: got a int, expected a string"),
        (
            {"target": images(2)},
            ValueError,
            "target: got 2 of 32 x 32, expected one for each .* 1 of",
        ),
        ({"target": images(1)[..., :16]}, ValueError, "target: got 1 of 32 x 16"),
        ({"target": images(1) * 255}, ValueError, "target: got 0.* expected values in"),
        ({"target": "missing.png"}, ValueError, "target: .*missing.png"),
        ({"strength": 0.01}, ValueError, "strength: got 0.01, expected 0.02 to 1"),
        ({"p": -1}, ValueError, "p: got -1"),
        ({"alpha": float("nan")}, ValueError, "alpha: got nan"),
        ({"lr": float("inf")}, ValueError, "lr: got inf"),
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"distance": lambda a, b: (a - b).mean()}, ValueError, r"distance: got shape \(\), expected \(1,\)"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        glaze(
            **{"images": images(1), "pipe": tiny_pipeline("sd1"), "target": images(1), "steps": 1} | arguments
        )
