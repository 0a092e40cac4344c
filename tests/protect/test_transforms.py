"""Each transform against somebody else's: torch's, scipy's, Pillow's."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from pumice import testbed
from pumice.models import load
from pumice.models.draws import Draws
from pumice.ops import differentiable_jpeg
from pumice.ops.differentiable_jpeg import quantization_tables
from pumice.protect import photoguard
from pumice.protect.transforms import JPEG, Blur, Crop, Flip, Resize
from pumice.testbed import world

ALL = [Resize(), Resize(mode="bicubic"), Crop(), Blur(), Flip(), JPEG()]
CPU = torch.device("cpu")


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """8-bit ones."""
    drawn = torch.stack([torch.from_numpy(world.subject(index, 0)) for index in range(4)])
    return (drawn * 255).round() / 255


def through_pillow(images: Tensor, quality: int) -> Tensor:
    read = []
    for image in (images * 255).round().byte():
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling=2)
        read.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255)
    return torch.stack(read)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resize_is_torchs_with_a_size_for_each_picture(mode):
    images = noise(4, 3, 48, 37, dtype=torch.float64)
    scales = torch.tensor([1.0, 0.71, 0.5, 0.13], dtype=torch.float64)
    found = Resize(mode=mode)(images, scales)
    assert torch.equal(found[0], images[0])
    for image, scale, mine in zip(images, scales.tolist(), found, strict=True):
        how = {"mode": mode, "antialias": True, "align_corners": False}
        small = F.interpolate(image[None], (round(48 * scale), round(37 * scale)), **how)
        torch.testing.assert_close(mine, F.interpolate(small, (48, 37), **how)[0].clamp(0, 1))


def test_crop_is_a_part_blown_up():
    images = noise(3, 3, 40, 30, dtype=torch.float64)
    scale, top, left = torch.tensor(
        [[1.0, 0.8, 0.5], [0.3, 0.0, 0.999], [0.7, 0.5, 0.2]], dtype=torch.float64
    )
    found = Crop()(images, scale, top, left)
    parts = [images[0], images[1, :, 0:32, 3:27], images[2, :, 20:40, 3:18]]
    for part, mine in zip(parts, found, strict=True):
        expected = F.interpolate(part[None], (40, 30), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("size", [(24, 17), (4, 4)])
def test_blur_is_scipys(size):
    images = noise(3, 3, *size, dtype=torch.float64)
    sigmas = [0.1, 0.9, 2.0]
    found = Blur(7)(images, torch.tensor(sigmas, dtype=torch.float64))
    for image, sigma, mine in zip(images.numpy(), sigmas, found, strict=True):
        expected = ndimage.gaussian_filter(image, sigma, axes=(1, 2), radius=3, mode="mirror")
        np.testing.assert_allclose(mine, expected, atol=1e-12)


def test_flip_exchanges_left_and_right_of_those_that_are_drawn():
    images = noise(2, 3, 8, 9)
    found = Flip()(images, torch.tensor([False, True]))
    assert torch.equal(found[0], images[0])
    np.testing.assert_array_equal(found[1].numpy(), images[1].numpy()[:, :, ::-1])


@pytest.mark.parametrize("size", [(64, 64), (64, 50), (37, 61), (1, 9)])
@pytest.mark.parametrize("quality", [10, 50, 75, 90, 100])
def test_jpeg_is_as_pillows(pictures, quality, size):
    images = pictures[:, :, 8 : 8 + size[0], : size[1]] if size[0] < 50 else pictures[..., : size[1]]
    found, expected = differentiable_jpeg(images, quality), through_pillow(images, quality)
    # of 255 levels; Pillow rounds colours and the result to 8 bit
    assert (found - expected).abs().mean() * 255 < 1.5
    if size != (1, 9):  # most of what it did to them is the same, too
        assert (found - expected).abs().mean() < 0.35 * (images - expected).abs().mean()


def test_jpeg_keeps_what_it_can_keep(pictures):
    grey = noise(2, 1, 1, 1).expand(2, 3, 32, 32)
    for quality in (100, 75, 5):
        step = quantization_tables(torch.tensor([quality]))[0, 0, 0, 0].item() / 8
        found = differentiable_jpeg(grey, quality)
        assert (found - found[:, :1, :1, :1]).abs().max() < 1e-5  # even and grey
        assert (found - grey).abs().max() * 255 <= step / 2 + 1e-3
    again = differentiable_jpeg(differentiable_jpeg(pictures, 75), 75)
    once = differentiable_jpeg(pictures, 75)
    assert (again - once).abs().mean() < (once - pictures).abs().mean() / 3


def test_each_picture_has_its_own_quality(pictures):
    found = differentiable_jpeg(pictures, torch.tensor([10, 50, 75, 95]))
    for image, quality, mine in zip(pictures, (10, 50, 75, 95), found, strict=True):
        torch.testing.assert_close(mine, differentiable_jpeg(image[None], quality)[0])


@pytest.mark.parametrize(
    ("transform", "drawn"),
    [
        (Resize(), [(0.6, 0.9)]),
        (Resize(mode="bicubic"), [(0.6, 0.9)]),
        (Crop(), [(0.8, 0.7), (0.5, 0.1), (0.9, 0.0)]),
        (Blur(5), [(0.7, 1.5)]),
        (Flip(), [(True, False)]),
    ],
    ids=str,
)
def test_gradients(transform, drawn):
    images = (0.2 + 0.6 * noise(2, 3, 7, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: transform(x, *map(torch.tensor, drawn)), images)


@pytest.mark.parametrize("transform", ALL, ids=str)
def test_what_a_picture_draws_is_its_own(transform):
    draws = Draws(["3", "4", "5"], CPU)
    images = noise(3, 3, 16, 24)
    batch = transform.draw([0, 1, 2], 7, draws)
    alone = transform.draw([1], 7, Draws(["0", "4"], CPU))
    for ours, its in zip(batch, alone, strict=True):
        assert torch.equal(ours[1:2], its)
    torch.testing.assert_close(transform(images, *batch)[1:2], transform(images[1:2], *alone))
    later = transform.draw([1], 8, draws)
    assert isinstance(transform, Flip) or not torch.equal(later[0], alone[0])


@pytest.mark.parametrize("transform", ALL, ids=str)
def test_pictures_stay_pictures_of_their_size(transform):
    draws = Draws(["0"] * 5, CPU)
    for shape in ((5, 3, 16, 16), (5, 3, 21, 10)):
        images = noise(*shape).round()  # black and white: what overshoots, leaves [0, 1]
        for step in range(5):
            found = transform(images, *transform.draw(range(5), step, draws))
            assert found.shape == images.shape and found.dtype == images.dtype
            assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6


@pytest.mark.parametrize("transform", ALL, ids=str)
def test_nothing_is_read_back_on_the_way(transform):
    drawn = transform.draw([0, 1], 0, Draws(["0", "1"], CPU))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # tensors without values: reading one raises
        images = mode.from_tensor(noise(2, 3, 32, 16)).requires_grad_()
        found = transform(images, *map(mode.from_tensor, drawn))
        found.sum().backward()
    assert found.shape == images.grad.shape == (2, 3, 32, 16)


def test_numbers_fill_their_intervals():
    draws = Draws(["0"] * 1, CPU)
    sigmas = torch.cat([Blur(sigma=(0.5, 1.5)).draw([0], step, draws)[0] for step in range(300)])
    assert 0.5 <= sigmas.min() < 0.52 and 1.48 < sigmas.max() <= 1.5
    assert sigmas.mean() == pytest.approx(1, abs=0.06)
    tables = torch.cat([JPEG((40, 42)).draw([0], step, draws)[0] for step in range(60)])
    expected = quantization_tables(torch.tensor([40, 41, 42]))
    assert {tuple(t.flatten().tolist()) for t in tables} == {tuple(t.flatten().tolist()) for t in expected}
    flips = torch.cat([Flip(0.25).draw([0], step, draws)[0] for step in range(400)])
    assert flips.float().mean() == pytest.approx(0.25, abs=0.07)


def test_steps_through_a_jpeg_survive_pillows(pictures):
    pipe = testbed.load()
    model = load(pipe)
    how = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 20}

    @torch.no_grad()
    def norm(images: Tensor) -> Tensor:  # what the attack makes smaller
        return model.encode_image(through_pillow(images, 40)).flatten(1).norm(dim=1)

    pictures = pictures[:3]
    plain = photoguard(pictures, pipe, **how)
    robust = photoguard(pictures, pipe, transforms=[JPEG((40, 40))], **how)
    assert (norm(robust) < norm(plain)).all() and (norm(plain) < norm(pictures)).all()
    batch = photoguard(pictures[:2], pipe, transforms=ALL, seed=[0, 1], **how | {"steps": 3})
    alone = photoguard(pictures[1:2], pipe, transforms=ALL, seed=1, **how | {"steps": 3})
    assert (batch[1] - alone[0]).abs().lt(1e-6).double().mean() > 0.99


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Resize((0.5, 1.5)),
            ValueError,
            r"scale: got \(0.5, 1.5\), expected an ordered pair above 0",
        ),
        (lambda: Resize((0.0, 1.0)), ValueError, r"scale: got \(0.0, 1.0\)"),
        (lambda: Resize(0.5), TypeError, "scale: got 0.5, expected"),
        (lambda: Resize(mode="nearest"), ValueError, "mode: got 'nearest'"),
        (lambda: Crop((0.9, 0.8)), ValueError, r"scale: got \(0.9, 0.8\)"),
        (lambda: Blur(4), ValueError, "kernel_size: got 4, expected an odd"),
        (lambda: Blur(sigma=(float("nan"), 1.0)), ValueError, r"sigma: got \(nan, 1.0\)"),
        (lambda: Blur(sigma=(0.1, float("inf"))), ValueError, r"sigma: got \(0.1, inf\)"),
        (lambda: Blur(9)(noise(1, 3, 4, 8), torch.ones(1)), ValueError, "kernel_size: got 9.*4 x 8"),
        (lambda: Flip(1.5), ValueError, "p: got 1.5"),
        (lambda: JPEG((0, 50)), ValueError, r"quality: got \(0, 50\)"),
        (lambda: JPEG((50, 50.5)), TypeError, r"quality: got \(50, 50.5\), expected whole numbers"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("transform", [Resize(), Crop()], ids=str)
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_saturated_pictures_keep_their_gradient(transform, level):
    """Linear kernels do not overshoot: rounding does, by an ulp, where a clamp would end the gradient."""
    images = torch.full((4, 3, 40, 40), level, requires_grad=True)
    found = transform(images, *transform.draw(range(4), 0, Draws(list("abcd"), CPU)))
    (gradient,) = torch.autograd.grad(found.sum(), images)
    torch.testing.assert_close(found.detach(), images.detach(), rtol=0, atol=1e-6)
    assert float(gradient.sum()) == pytest.approx(images.numel(), rel=1e-5)
