"""GrIDPure: many small purifications of overlapping parts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from pumice import purify, testbed
from pumice.models.draws import Draws
from pumice.purify import pixels
from pumice.purify.grid import Grid
from pumice.testbed import world


def tiny() -> DDPMPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16,
            out_channels=6,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
        )
    return DDPMPipeline(unet.eval(), DDPMScheduler(variance_type="learned_range"))


def pictures(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


class Stub:
    """Instead of the sampler: what it makes of a row is a formula."""

    size, noise = 256, 0.0

    def __init__(self, _: object, parts: Sequence[int], **__: object) -> None:
        self.count, self.draw = sum(parts), torch.Generator().manual_seed(0)

    def __call__(self, rows: Sequence[Tensor], _: object) -> list[Tensor]:
        assert len(rows) == self.count
        return [row + self.noise * torch.randn(row.shape, generator=self.draw) for row in rows]


@pytest.fixture
def stub(monkeypatch):
    """`gridpure` with boxes of 256 px and the stub, whose noise is to be set."""
    pipe = tiny()
    pipe.unet.register_to_config(sample_size=256)
    monkeypatch.setattr(sys.modules["pumice.purify.gridpure"], "PixelSampler", Stub)
    monkeypatch.setattr(Stub, "noise", 0.0)
    return pipe


def serial(pipe: DDPMPipeline, image: Tensor, t: int, iterations: int, gamma: float, seed: int) -> Tensor:
    """One picture, part after part, as the paper writes it; boxes of 16 px."""
    grid, abar = Grid(*image.shape[1:], 16, 8), pipe.scheduler.alphas_cumprod.double()
    for turn in range(iterations):
        boxes = []
        for part, box in enumerate(grid.split(image)):
            draws = Draws([f"{seed}/{part}"], torch.device("cpu"))
            noise = draws.normal([0], "start", turn, box.shape)
            x = abar[t - 1].sqrt() * (box * 2 - 1)[None].double() + (1 - abar[t - 1]).sqrt() * noise
            for step, i in enumerate(reversed(range(t))):
                epsilon, v = pipe.unet(x.float(), i).sample.double().chunk(2, dim=1)
                before = abar[i - 1] if i else abar.new_ones(())
                beta = 1 - abar[i] / before
                x0 = ((x - (1 - abar[i]).sqrt() * epsilon) / abar[i].sqrt()).clamp(-1, 1)
                x = (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - abar[i])
                if i:
                    low = (beta * (1 - before) / (1 - abar[i])).log()
                    log_variance = low + (v + 1) / 2 * (beta.log() - low)
                    x = x + (log_variance / 2).exp() * draws.normal([0], f"step {step}", turn, box.shape)
            boxes.append((x[0] / 2 + 0.5).clamp(0, 1).float())
        image = (1 - gamma) * grid.merge(boxes) + gamma * image
    return image


@torch.no_grad()
def test_the_batched_form_is_the_serial_one():
    pipe, images = tiny(), pictures(2, 32, 24)
    how = {"t": 4, "iterations": 3, "gamma": 0.2}
    found = purify.gridpure(images, pipe, seed=6, **how)
    expected = torch.stack([serial(pipe, image, *how.values(), 6 + n) for n, image in enumerate(images)])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_a_batch_is_its_pictures_alone():
    pipe, images, how = tiny(), pictures(3), {"t": 2, "iterations": 2}
    batch = purify.gridpure(images, pipe, seed=[3, 9, 4], batch_size=7, **how)
    alone = [purify.gridpure(images[i : i + 1], pipe, seed=s, **how) for i, s in enumerate([3, 9, 4])]
    torch.testing.assert_close(batch, torch.cat(alone), rtol=0, atol=1e-5)
    turned = purify.gridpure(images.flip(0), pipe, seed=[4, 9, 3], **how).flip(0)
    torch.testing.assert_close(batch, turned, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(256, 256), (300, 517), (768, 640), (1024, 1000), (100, 300), (31, 45)])
def test_a_denoiser_that_changes_nothing_gives_the_picture_back(stub, size):
    images = pictures(1, *size)
    found = purify.gridpure(images, stub, iterations=3)
    torch.testing.assert_close(found, images, rtol=0, atol=2e-7)


def test_gamma_1_is_the_picture():
    images = pictures(2, 20, 37)
    assert torch.equal(purify.gridpure(images, tiny(), t=2, iterations=2, gamma=1), images)


@pytest.mark.parametrize(("how", "passes"), [({}, 10), ({"sampler": "one_shot"}, 1)])
def test_what_it_costs(how, passes):
    """Ten boxes a picture and round: nine and the corners."""
    pipe, rows = tiny(), []
    pipe.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    purify.gridpure(pictures(2), pipe, iterations=2, batch_size=20, **how)
    assert rows == [20] * 2 * passes


def test_pictures_stay_floating_between_rounds_unless_asked(stub, monkeypatch):
    monkeypatch.setattr(Stub, "noise", 1 / 255)
    images = pictures(1, 256, 256) * 0.5 + 0.25
    how = {"iterations": 10, "gamma": 0}
    levels = 255 * (purify.gridpure(images, stub, **how) - images).mean()
    assert abs(levels) < 0.1
    darker = 255 * (purify.gridpure(images, stub, faithful_quantize=True, **how) - images).mean()
    assert darker == pytest.approx(-5, abs=0.5)  # half a level a round


def test_the_other_variant():
    pipe, seen = tiny(), []
    pipe.unet.register_forward_pre_hook(
        lambda _, given: seen.append((int(given[1]), len(given[0]), given[0].mean().item()))
    )
    found = purify.gridpure(torch.full((1, 3, 32, 32), 0.5), pipe, iterations=1, variant="ds")
    assert [t for t, _, _ in seen] == [40, 36, 32, 28, 24, 20, 16, 12, 8, 4]
    assert {rows for _, rows, _ in seen} == {9}  # no corners
    assert seen[0][2] == pytest.approx(0.5, abs=0.02)  # 0 in the model's range
    assert 0 <= found.min() and found.max() <= 1


def test_noise_of_8_levels_becomes_3_db_less():
    clean = torch.from_numpy(world.subject(1, 0))[None]
    sign = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).sign()
    noisy = (clean + 8 / 255 * sign).clamp(0, 1)
    found = purify.gridpure(noisy, testbed.load_denoiser(), iterations=3)
    before, after = ((each - clean).square().mean().log10() * -10 for each in (noisy, found))
    assert after > before + 3


def test_the_denoiser_is_left_as_it_was(monkeypatch):
    pipe = tiny()
    pipe.unet.train()

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("on the way")

    monkeypatch.setattr(Grid, "merge", fail)
    with pytest.raises(KeyboardInterrupt):
        purify.gridpure(pictures(), pipe, t=1, iterations=2)
    assert all(module.training for module in pipe.unet.modules())
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"t": 0}, ValueError, "t: got 0"),
        ({"t": 1001}, ValueError, "t: got 1001, expected 1 to 1000"),
        ({"t": 250, "variant": "ds"}, ValueError, "t: got 250, expected 1 to 249 for variant='ds'"),
        ({"variant": "ds", "sampler": "one_shot"}, ValueError, "^sampler: got 'one_shot'"),
        ({"variant": "gp"}, ValueError, "variant: got 'gp', expected 'official' or 'ds'"),
        ({"gamma": 1.5}, ValueError, "gamma: got 1.5, expected 0 to 1"),
        ({"gamma": "a"}, TypeError, "gamma: got a str"),
        ({"iterations": 0}, ValueError, "iterations: got 0"),
        ({"stride": 3}, TypeError, "stride"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        purify.gridpure(pictures(), tiny(), **arguments)


def test_boxes_are_what_the_network_takes():
    pipe, seen = tiny(), []
    pipe.unet.register_to_config(sample_size=17)
    pipe.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[2:]))
    found = purify.gridpure(pictures(1, 20, 17), pipe, t=1, iterations=1)
    assert found.shape == (1, 3, 20, 17) and set(seen) == {(18, 18)}


def test_the_bar_is_closed_after_an_error(monkeypatch):
    pipe, bars = tiny(), []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.closed = 0
            bars.append(self)

        def close(self):
            self.closed = getattr(self, "closed", 0) + 1
            super().close()

    monkeypatch.setattr(pixels, "tqdm", Bar)
    purify.gridpure(pictures(), pipe, t=1, iterations=2)
    assert bars[0].closed == 1
    pipe.unet.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        purify.gridpure(pictures(), pipe, t=1, iterations=2)
    assert bars[1].closed == 1


def test_a_denoiser_without_a_size_is_refused():
    pipe = tiny()
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="denoiser: it does not say which size it has"):
        purify.gridpure(pictures(), pipe)
