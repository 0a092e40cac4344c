"""DiffPure: whole pictures through a denoiser of pixels."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from pumice import purify, testbed
from pumice.io import save_lossless
from pumice.models import Denoised, PixelDenoiser, UnsupportedModelError
from pumice.models.draws import Draws
from pumice.testbed import world


def tiny(variance: str = "learned_range", size: int | None = 16) -> DDPMPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=size,
            out_channels=6 if variance == "learned_range" else 3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
        )
    return DDPMPipeline(unet.eval(), DDPMScheduler(variance_type=variance))


def pictures(count: int = 3, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def plain(pipe: DDPMPipeline, image: Tensor, t: int, seed: int) -> Tensor:
    """One picture (3, h, w), as the paper writes it."""
    abar = pipe.scheduler.alphas_cumprod.double()
    draws = Draws([f"{seed}/0"], torch.device("cpu"))
    x = (image * 2 - 1)[None].double()
    x = abar[t - 1].sqrt() * x + (1 - abar[t - 1]).sqrt() * draws.normal([0], "start", 0, image.shape)
    for step, i in enumerate(reversed(range(t))):
        output = pipe.unet(x.float(), i).sample.double()
        before = abar[i - 1] if i else abar.new_ones(())
        beta = 1 - abar[i] / before
        posterior = beta * (1 - before) / (1 - abar[i])
        if pipe.scheduler.config.variance_type == "learned_range":
            output, v = output.chunk(2, dim=1)
            variance = ((v + 1) / 2 * beta.log() + (1 - (v + 1) / 2) * posterior.log()).exp()
        else:
            variance = beta if pipe.scheduler.config.variance_type == "fixed_large" else posterior
        x0 = ((x - (1 - abar[i]).sqrt() * output) / abar[i].sqrt()).clamp(-1, 1)
        x = (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - abar[i])
        if i:
            x = x + variance**0.5 * draws.normal([0], f"step {step}", 0, image.shape)
    return (x[0] / 2 + 0.5).float()


@torch.no_grad()
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_it_is_the_algorithm_of_the_paper(variance):
    pipe, images = tiny(variance), pictures()
    found = purify.diffpure(images, pipe, t=12, seed=4)
    expected = torch.stack([plain(pipe, image, 12, 4 + number) for number, image in enumerate(images)])
    torch.testing.assert_close(found, expected.clamp(0, 1), rtol=0, atol=2e-5)


def test_a_batch_is_its_pictures_alone_in_any_order():
    pipe, images = tiny(), pictures(4)
    how = {"t": 5, "batch_size": 3}
    batch = purify.diffpure(images, pipe, seed=[3, 9, 4, 1], **how)
    turned = purify.diffpure(images.flip(0), pipe, seed=[1, 4, 9, 3], **how).flip(0)
    alone = torch.cat(
        [purify.diffpure(images[i : i + 1], pipe, seed=s, t=5) for i, s in enumerate([3, 9, 4, 1])]
    )
    torch.testing.assert_close(batch, turned, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-5)
    assert torch.equal(batch, purify.diffpure(images, pipe, seed=[3, 9, 4, 1], **how))
    assert not torch.equal(batch, purify.diffpure(images, pipe, seed=50, **how))


@pytest.mark.parametrize(("how", "passes"), [("ddpm", 40), ("dpmsolver++", 30), ("one_shot", 1)])
def test_samplers_and_what_they_cost(how, passes):
    pipe, seen = tiny(), []
    pipe.unet.register_forward_pre_hook(lambda _, given: seen.append(int(given[1])))
    purify.diffpure(pictures(2), pipe, t=40, sampler=how)
    assert len(seen) == passes and seen[0] == 39 and seen == sorted(set(seen), reverse=True)


@pytest.mark.parametrize("size", [(16, 16), (9, 31), (40, 17), (3, 5)])
def test_pictures_of_any_size_come_back_so(size):
    pipe, images, shapes = tiny(), pictures(2, *size), []
    pipe.unet.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape[2:])))
    for how in ("resize", "native"):
        found = purify.diffpure(images, pipe, t=2, size=how)
        assert found.shape == images.shape and 0 <= found.min() and found.max() <= 1
    assert min(shapes[0]) == 16 and shapes[-1] == tuple(side + side % 2 for side in size)
    assert all(side % 2 == 0 for shape in shapes for side in shape)


def test_files_come_back_as_pil_images_with_what_they_said(tmp_path):
    pixels = (pictures(1, 20, 24)[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels).convert("RGBA")
    image.putalpha(77)
    image.info = {"dpi": (300.0, 300.0), "exif": Image.Exif().tobytes()}
    save_lossless(image, tmp_path / "a.png")
    other = Image.fromarray(pixels[:18, :16].copy())
    found = purify.diffpure([tmp_path / "a.png", other], tiny(), t=2, size="native")
    assert [each.size for each in found] == [(24, 20), (16, 18)] and found[0].mode == "RGBA"
    assert set(found[0].getchannel("A").tobytes()) == {77} and round(found[0].info["dpi"][0]) == 300
    alone = purify.diffpure(other, tiny(), t=2, size="native", seed=1)
    assert isinstance(alone, Image.Image)
    assert max(abs(a - b) for a, b in zip(alone.tobytes(), found[1].tobytes(), strict=True)) <= 1


def test_the_type_of_the_tensor_stays():
    images = pictures(1).half()
    found = purify.diffpure(images, tiny(), t=2)
    assert found.dtype == torch.float16 and found.shape == images.shape


def test_running_out_of_memory_halves_the_batch_and_changes_nothing(monkeypatch):
    pipe, images, sizes, call = tiny(), pictures(4), [], PixelDenoiser.__call__
    expected = purify.diffpure(images, pipe, t=3)

    def limited(self: PixelDenoiser, x: Tensor, timestep: Tensor) -> Denoised:
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, x, timestep)

    monkeypatch.setattr(PixelDenoiser, "__call__", limited)
    torch.testing.assert_close(purify.diffpure(images, pipe, t=3), expected, rtol=0, atol=1e-5)
    assert sizes == [4] + [2] * 6


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_denoiser_is_left_as_it_was(error, monkeypatch):
    pipe = tiny()
    pipe.unet.train()
    pipe.unet.conv_in.requires_grad_(False)
    before = [(name, p.requires_grad, p.clone()) for name, p in pipe.unet.named_parameters()]
    if error:

        def fail(*_: object) -> None:
            raise error("on the way")

        monkeypatch.setattr(PixelDenoiser, "__call__", fail)
        with pytest.raises(error, match="on the way"):
            purify.diffpure(pictures(), pipe, t=2)
    else:
        purify.diffpure(pictures(), pipe, t=2)
    assert all(module.training for module in pipe.unet.modules())
    for (name, flag, value), (now, p) in zip(before, pipe.unet.named_parameters(), strict=True):
        assert (name, flag) == (now, p.requires_grad) and torch.equal(value, p) and p.grad is None


def test_a_result_that_is_not_finite_is_an_error():
    pipe = tiny()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"images\[0\]: its result is not finite"):
        purify.diffpure(pictures(), pipe, t=2)


def test_the_trained_denoiser_takes_noise_away():
    clean = torch.stack([torch.from_numpy(world.subject(index, 0)) for index in range(2)])
    sign = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).sign()
    noisy = (clean + 8 / 255 * sign).clamp(0, 1)
    found = purify.diffpure(noisy, testbed.load_denoiser(), t=10, size="native")
    assert ((found - clean).square().mean((1, 2, 3)) < (noisy - clean).square().mean((1, 2, 3)) / 2).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"t": 0}, ValueError, "t: got 0, expected at least 1"),
        ({"t": 1001}, ValueError, "t: got 1001, expected 1 to 1000"),
        ({"t": 1.5}, TypeError, "t: got a float"),
        ({"size": "crop"}, ValueError, "size: got 'crop', expected one of resize, native"),
        ({"sampler": "ddim"}, ValueError, "sampler: got 'ddim'"),
        ({"num_inference_steps": 5}, ValueError, "num_inference_steps: got 5, expected none"),
        ({"steps": 5}, TypeError, "steps"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"batch_size": "all"}, TypeError, "batch_size: got a str"),
        ({"seed": "a"}, TypeError, "seed: got a str"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        purify.diffpure(pictures(), tiny(), **arguments)


def test_bad_pictures_and_denoisers():
    with pytest.raises(ValueError, match=r"images: got .* to .*, expected values in"):
        purify.diffpure(pictures() + 1, tiny())
    with pytest.raises(ValueError, match="size: got 'resize' for a denoiser that has no size of its own"):
        purify.diffpure(pictures(), tiny(size=None))
    with pytest.raises(TypeError, match="denoiser: got a int"):
        purify.diffpure(pictures(), 3)
    with pytest.raises(UnsupportedModelError, match=r"denoiser: got a .*, which works in latents"):
        purify.diffpure(pictures(), testbed.tiny_pipeline("sd1"))
    with pytest.raises(ValueError, match=r"images: got shape \(0, 3, 16, 16\), expected .* with B, H, W > 0"):
        purify.diffpure(torch.zeros(0, 3, 16, 16), tiny())


def test_narrow_pictures_are_not_blown_up():
    with pytest.raises(ValueError, match=r"images: got 4 x 68 pixels, expected at most 16 .*size='native'"):
        purify.diffpure(pictures(1, 4, 68), tiny(), t=1)
    assert purify.diffpure(pictures(1, 4, 64), tiny(), t=1).shape == (1, 3, 4, 64)
    assert purify.diffpure(pictures(1, 4, 68), tiny(), t=1, size="native").shape == (1, 3, 4, 68)


def test_a_size_that_the_network_cannot_halve():
    pipe, seen = tiny(size=17), []
    pipe.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[2:]))
    purify.diffpure(pictures(1, 20, 30), pipe, t=1)
    assert seen == [(18, 28)]
