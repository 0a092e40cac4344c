"""IMPRESS: pictures that the autoencoder passes on as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pumice import protect, purify, testbed
from pumice.models import load
from pumice.models.draws import Draws
from pumice.testbed import world
from pumice.testbed.tiny import tiny_pipeline


def pictures(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


ALPHA, P = 1.0, 0.001  # so dear that the distance counts


class Maps(nn.Module):
    """Features with weights of their own, as LPIPS has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2)
        self.calls = 0

    def forward(self, images: Tensor) -> list[Tensor]:
        self.calls += 1
        first = torch.tanh(self.first(images))
        return [first, self.second(first)]


def maps() -> Maps:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Maps()


def objective(pipe: Any, x: Tensor, given: Tensor, features: Any, alpha: float, p: float) -> Tensor:
    """Of one picture, x in [-1, 1] and the given one in [0, 1], as the paper writes it."""
    passed = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
    distance = sum(
        (now - was).square().sum(1).mean()
        for now, was in zip(features(x / 2 + 0.5), features(given), strict=True)
    )
    return (passed - x).square().mean() + alpha * (distance - p).clamp(min=0)


def begun(given: Tensor, seed: int) -> Tensor:
    noise = Draws([f"{seed}/0"], torch.device("cpu")).normal([0], "start", 0, given.shape[1:])
    return (given * 2 - 1 + 0.1 * noise).clamp(-1, 1)


def plain(pipe: Any, given: Tensor, features: Any, steps: int, seed: int) -> Tensor:
    """One picture (1, 3, H, W), with weight gradients and features computed again at each step."""
    x = begun(given, seed).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.01, eps=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(pipe, x, given, features, ALPHA, P).backward()
        optimizer.step()
        schedule.step()
        x.data.clamp_(-1, 1)
    return x.detach() / 2 + 0.5


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_it_is_the_plain_loop(family):
    pipe, images, features = tiny_pipeline(family), pictures(), maps()
    found = purify.impress(images, pipe, steps=12, perceptual=features, seed=5, alpha=ALPHA, p=P)
    expected = [plain(pipe, images[i : i + 1], features, 12, 5 + i) for i in range(2)]
    # where a gradient is next to nothing, rounding decides how much of the rate it is
    apart = (found - torch.cat(expected)).abs()
    assert apart.mean() < 1e-4 and apart.max() < 0.01
    start = torch.cat([begun(images[i : i + 1], 5 + i) for i in range(2)]) / 2 + 0.5
    assert (found - start).abs().mean() > 0.02  # it moved
    free = purify.impress(images, pipe, steps=12, perceptual=features, seed=5, alpha=0)
    assert (found - free).abs().mean() > 0.001  # and the distance counted


def test_protected_pictures_become_consistent():
    pipe = testbed.load()
    cloaked = protect.photoguard(torch.from_numpy(world.subject(0, 0))[None], pipe, eps=8 / 255, steps=10)
    found = purify.impress(cloaked, pipe, steps=30, noise=0.0)
    model = load(pipe)
    with torch.no_grad():
        before, after = (
            (model.decode_latents(model.encode_image(x)) - x).square().mean() for x in (cloaked, found)
        )
    assert after < 0.7 * before


def test_a_dear_distance_is_kept():
    pipe, images = testbed.load(), torch.from_numpy(world.subject(0, 0))[None]

    def distance(x: Tensor) -> float:
        both = zip(*map(purify.laplacian_pyramid, (x, images)), strict=True)
        return float(sum((a - b).square().sum(1).mean() for a, b in both))

    how = {"steps": 20, "noise": 0.0, "p": 0.003}
    cheap, dear = (distance(purify.impress(images, pipe, alpha=alpha, **how)) for alpha in (0.0, 10.0))
    assert dear < 0.005 < cheap


def test_a_batch_is_its_pictures_alone():
    pipe, images = tiny_pipeline("sd1"), pictures(3)
    batch = purify.impress(images, pipe, steps=5, seed=[4, 8, 6], batch_size=2)
    alone = [purify.impress(images[i : i + 1], pipe, steps=5, seed=s) for i, s in enumerate([4, 8, 6])]
    assert (batch - torch.cat(alone)).abs().mean() < 1e-5
    assert torch.equal(batch, purify.impress(images, pipe, steps=5, seed=[4, 8, 6], batch_size=2))


def test_nothing_is_computed_that_nobody_uses():
    pipe, features = tiny_pipeline("sd1"), maps()
    asked = []
    pipe.vae.encoder.register_forward_pre_hook(
        lambda *_: asked.append(
            any(p.requires_grad for p in (*pipe.vae.parameters(), *features.parameters()))
        )
    )
    purify.impress(pictures(), pipe, steps=4, perceptual=features)
    assert features.calls == 5 and asked == [False] * 4  # the features of what was given once
    assert all(p.grad is None for p in (*pipe.vae.parameters(), *features.parameters()))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_networks_are_left_as_they_were(error, monkeypatch):
    pipe, features = tiny_pipeline("sd1"), maps()
    pipe.vae.train()
    features.second.requires_grad_(False)
    if error:

        def fail(*_: object) -> None:
            raise error("on the way")

        monkeypatch.setattr(torch.optim.Adam, "step", fail)
        with pytest.raises(error, match="on the way"):
            purify.impress(pictures(), pipe, steps=2, perceptual=features)
    else:
        purify.impress(pictures(), pipe, steps=2, perceptual=features)
    assert all(part.training and "forward" not in vars(part) for part in pipe.vae.modules())
    assert all(p.requires_grad for p in (*pipe.vae.parameters(), *features.first.parameters()))
    assert features.training and not any(p.requires_grad for p in features.second.parameters())


def test_running_out_of_memory_halves_the_batch():
    pipe, images, sizes = tiny_pipeline("sd1"), pictures(4), []
    expected = purify.impress(images, pipe, steps=2)

    def limited(x: Tensor) -> list[Tensor]:
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return purify.laplacian_pyramid(x)

    found = purify.impress(images, pipe, steps=2, perceptual=limited)
    assert (found - expected).abs().mean() < 1e-5
    assert sizes == [4] + [2] * 6


def test_steps_that_are_done_again_count_once(capsys):
    calls = []

    def limited(x: Tensor) -> list[Tensor]:
        calls.append(len(x))
        if calls == [4] * 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return purify.laplacian_pyramid(x)

    purify.impress(pictures(4), tiny_pipeline("sd1"), steps=3, perceptual=limited, progress=True)
    assert calls == [4] * 3 + [2] * 8
    assert "12/12" in capsys.readouterr().err


@pytest.mark.parametrize("side", [1, 3])
def test_the_smallest_pictures(side):
    found = purify.impress(pictures(1, side, 5), tiny_pipeline("sd1"), steps=1, batch_size=None)
    assert found.shape == (1, 3, side, 5)


def test_pictures_of_any_size_and_kind():
    pipe = tiny_pipeline("sd1")
    found = purify.impress(
        [Image.new("RGB", (33, 17), (9, 200, 90)), Image.new("RGB", (16, 16))], pipe, steps=1
    )
    assert [each.size for each in found] == [(33, 17), (16, 16)]
    with torch.inference_mode():
        images = pictures(1, 31, 20).half()
        assert purify.impress(images, pipe, steps=2).shape == images.shape


def test_half_precision_networks_keep_pictures_in_single_precision():
    pipe, images = testbed.load(dtype=torch.bfloat16), torch.from_numpy(world.subject(0, 0))[None]
    found = purify.impress(images, pipe, steps=3, noise=0.0, learning_rate=1e-4)
    assert found.dtype == torch.float32
    assert 0 < (found - images).abs().max() < 2e-4  # steps that would vanish in bfloat16 beside values near 1


def test_the_pyramid_of_an_even_picture_is_its_colour():
    *bands, rest = purify.laplacian_pyramid(torch.full((1, 3, 24, 40), 0.4))
    assert [tuple(band.shape[2:]) for band in bands] == [(24, 40), (12, 20), (6, 10)]
    assert all(band.abs().max() < 1e-6 for band in bands)
    torch.testing.assert_close(rest, torch.full((1, 3, 3, 5), 0.4 / 0.5 / 3**0.5))


def test_the_pyramid_sees_noise_less_in_texture():
    draw = torch.Generator().manual_seed(0)
    even, noise = torch.full((1, 3, 64, 64), 0.5), 0.02 * torch.randn(1, 3, 64, 64, generator=draw)
    busy = even + 0.2 * torch.randn(1, 3, 64, 64, generator=draw).sign()

    def distance(a: Tensor, b: Tensor) -> float:
        both = zip(purify.laplacian_pyramid(a), purify.laplacian_pyramid(b), strict=True)
        return float(sum((x - y).square().sum(1).mean() for x, y in both))

    assert distance(busy, busy + noise) < distance(even, even + noise) / 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"learning_rate": 0}, ValueError, "learning_rate: got 0, expected a finite number that is positive"),
        ({"alpha": -1}, ValueError, "alpha: got -1"),
        ({"p": float("nan")}, ValueError, "p: got nan"),
        ({"noise": "a"}, TypeError, "noise: got a str"),
        ({"perceptual": "lpips"}, TypeError, "perceptual: got a str, expected a function"),
        (
            {"perceptual": lambda x: x.mean()},
            ValueError,
            "perceptual: it gave a Tensor, expected feature maps",
        ),
        ({"perceptual": lambda x: []}, ValueError, "perceptual: it gave a list, expected feature maps"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"lr": 1}, TypeError, "lr"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        purify.impress(pictures(), tiny_pipeline("sd1"), **arguments)
