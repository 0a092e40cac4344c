"""Each filter against somebody else's: scipy's, Pillow's, its formula, the optimum of a convex solver."""

from __future__ import annotations

import inspect
import io
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from pumice import ops, testbed
from pumice.purify import filters
from pumice.purify.filters.tvm import solve

PURE = [getattr(filters, name) for name in filters.__all__ if name != "compose"]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def smooth(*shape: int) -> Tensor:
    """Pictures of 8 bits with edges, which compress as photographs do."""
    small = noise(*shape[:-2], shape[-2] // 8, shape[-1] // 8)
    return (F.interpolate(small, shape[-2:], mode="bicubic").clamp(0, 1) * 255).round() / 255


def pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


# --- What all of them do


@pytest.mark.parametrize("filter", PURE)
def test_pictures_come_back_as_they_came(filter, tmp_path):
    given = smooth(2, 3, 40, 32)
    expected = filter(given)
    assert expected.shape == given.shape and expected.dtype == given.dtype
    assert 0 <= expected.min() and expected.max() <= 1
    strided = given.to(memory_format=torch.channels_last)
    torch.testing.assert_close(filter(strided), expected, atol=1e-6, rtol=0)
    half = filter(given.half())
    assert half.dtype == torch.float16
    path = tmp_path / "given.png"
    see_through = pil(given[0])
    see_through.putalpha(77)
    see_through.save(path)
    small = pil(smooth(1, 3, 24, 16)[0])
    first, second = filter([path, small])
    assert first.mode == "RGBA" and first.getpixel((3, 4))[3] == 77 and second.size == small.size
    assert isinstance(filter(small), Image.Image)
    error = (tensor(first.convert("RGB")) - expected[0]).abs()
    steps = 2 if filter is filters.compress_and_resize else 1  # that many times rounded to 8 bits
    assert error.max() <= steps * 0.5 / 255 + 2e-4


@pytest.mark.parametrize("filter", PURE)
def test_even_pictures_stay(filter):
    level = 17 / 31  # one that 5 bits have
    even = torch.full((1, 3, 32, 48), level)
    near = 0.5 / 255 if filter in (filters.jpeg, filters.compress_and_resize) else 1e-6
    torch.testing.assert_close(filter(even), even, atol=near + 1e-6, rtol=0)


@pytest.mark.parametrize("filter", PURE)
def test_a_picture_alone_is_what_it_is_in_a_batch(filter):
    given = smooth(3, 3, 32, 40)
    seeded = {"seed": [4, 5, 6]} if "seed" in inspect.signature(filter).parameters else {}
    alone = {"seed": 6} if seeded else {}
    torch.testing.assert_close(filter(given, **seeded)[2:], filter(given[2:], **alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "filter", [partial(filters.gaussian, sigma=1), filters.resize, partial(filters.resize, back=False)]
)
def test_gradients_of_linear_filters(filter):
    x = noise(1, 3, 7, 6, dtype=torch.float64) / 2 + 0.25
    assert torch.autograd.gradcheck(filter, x.requires_grad_())
    assert not filters.median(x).requires_grad and not filters.bit_depth(x).requires_grad


@pytest.mark.parametrize(
    ("filter", "given", "error", "message"),
    [
        (filters.jpeg, {"quality": 101}, ValueError, "quality: got 101, expected 1 to 100"),
        (filters.jpeg, {"quality": 7.5}, TypeError, "quality: got a float"),
        (filters.bit_depth, {"bits": 9}, ValueError, "bits: got 9, expected 1 to 8"),
        (filters.gaussian, {"sigma": 0}, ValueError, "sigma: got 0"),
        (filters.gaussian, {"kernel_size": 4}, ValueError, "kernel_size: got 4, expected an odd number"),
        (filters.median, {"size": 4}, ValueError, "size: got 4"),
        (filters.bilateral, {"sigma_color": -1.0}, ValueError, "sigma_color: got -1"),
        (filters.total_variation, {"weight": -0.1}, ValueError, "weight: got -0.1"),
        (filters.resize, {"scale": 0}, ValueError, "scale: got 0"),
        (filters.resize, {"mode": "nearest"}, ValueError, "mode: got 'nearest', expected one of bilinear"),
        (filters.guided, {"eps": 0}, ValueError, "eps: got 0"),
        (filters.guided, {"radius": 0}, ValueError, "radius: got 0"),
        (filters.guided, {"guide": noise(1, 3, 8, 9)}, ValueError, r"guide: got pictures of \[\(8, 9\)\]"),
        (filters.adverse_cleaner, {"iterations": -1}, ValueError, "iterations: got -1"),
        (filters.tvm, {"drop_rate": 1.0}, ValueError, "drop_rate: got 1.0"),
        (filters.tvm, {"lamb": math.inf}, ValueError, "lamb: got inf"),
        (filters.tvm, {"variant": "mosek"}, ValueError, "variant: got 'mosek'"),
        (filters.tvm, {"size": 0}, ValueError, "size: got 0"),
        (filters.tvm, {"seed": [1, 2]}, ValueError, "seed: got 2"),
    ],
)
def test_bad_arguments(filter, given, error, message):
    with pytest.raises(error, match=f"^{message}"):
        filter(noise(1, 3, 8, 8), **given)


@pytest.mark.parametrize("filter", PURE)
def test_bad_pictures(filter):
    with pytest.raises(ValueError, match=r"^images: got 0 to 2"):
        filter(torch.tensor([0.0, 2.0]).expand(1, 3, 8, 2))
    with pytest.raises(TypeError, match=r"^images: got a int"):
        filter(3)


def test_a_smaller_picture_has_no_file():
    with pytest.raises(ValueError, match=r"^back: got False for PIL images"):
        filters.resize(pil(noise(3, 8, 8)), back=False)
    assert filters.resize(noise(1, 3, 8, 10), back=False).shape == (1, 3, 4, 5)


def test_composed():
    given = smooth(2, 3, 32, 32)
    both = filters.compose([filters.jpeg, partial(filters.resize, scale=0.5)])
    assert torch.equal(both(given), filters.resize(filters.jpeg(given), 0.5))
    assert torch.equal(both(given), filters.compress_and_resize(given))
    with pytest.raises(ValueError, match=r"^filters: got an empty list"):
        filters.compose([])
    with pytest.raises(TypeError, match=r"^filters\[1\]: got a str"):
        filters.compose([filters.jpeg, "median"])


# --- Each by itself


@pytest.mark.parametrize("quality", [10, 75, 100])
def test_jpeg_is_pillows(quality):
    given = [smooth(1, 3, 40, 56)[0], smooth(1, 3, 24, 16)[0], smooth(1, 3, 17 * 8, 8)[0]]
    found = filters.jpeg([pil(each) for each in given], quality)
    for image, each in zip(found, given, strict=True):
        file = io.BytesIO()
        pil(each).save(file, "JPEG", quality=quality, subsampling=2)
        assert image.tobytes() == Image.open(file).tobytes()
        assert torch.equal(tensor(image), filters.jpeg(each[None], quality)[0])


def test_differentiable_jpeg():
    given = smooth(2, 3, 48, 32).requires_grad_()
    found = filters.jpeg(given, 60, differentiable=True)
    assert torch.equal(found, ops.differentiable_jpeg(given, 60))
    assert (found - filters.jpeg(given, 60)).abs().mean() < 1 / 255
    found.square().sum().backward()
    assert given.grad.abs().sum() > 0


def test_bit_depth():
    found = filters.bit_depth(torch.tensor([0.0, 0.2, 0.3, 1.0]).expand(1, 3, 1, 4), 2)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([0, 1, 1, 3]) / 3)
    given = noise(1, 3, 64, 64)
    assert len(filters.bit_depth(given, 3).unique()) == 8
    assert (filters.bit_depth(given, 8) - given).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("sigma", "kernel_size"), [(0.4, None), (1.5, None), (5, 11), (3, 41), (60, None), (7, 101)]
)
def test_gaussian_is_scipys(sigma, kernel_size):
    given = noise(1, 3, 23, 14, dtype=torch.float64)
    radius = math.ceil(4 * sigma) if kernel_size is None else kernel_size // 2
    expected = ndimage.gaussian_filter(given.numpy(), sigma, mode="mirror", radius=(0, 0, radius, radius))
    torch.testing.assert_close(filters.gaussian(given, sigma, kernel_size), torch.from_numpy(expected))


@pytest.mark.parametrize("sigma", [1e6, 1e308, 10**300])
def test_the_widest_gaussian_is_a_mean_over_the_mirrored_picture(sigma):
    given = noise(1, 3, 23, 2, dtype=torch.float64)
    weights = torch.tensor([1.0] + [2.0] * 21 + [1.0], dtype=torch.float64) / 44
    expected = (weights @ given).mean(-1)[..., None, None].expand_as(given)
    torch.testing.assert_close(filters.gaussian(given, sigma), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("mode", "theirs"), [("bilinear", 2), ("bicubic", 3), ("lanczos", 1)])
@pytest.mark.parametrize("scale", [0.5, 0.37, 1.6])
def test_resize_is_pillows(mode, theirs, scale):
    given = noise(1, 3, 37, 52) * 0.8 + 0.1
    small = filters.resize(given, scale, mode=mode, back=False)
    size = (round(52 * scale), round(37 * scale))
    planes = [Image.fromarray(plane).resize(size, theirs) for plane in given[0].numpy()]
    expected = torch.from_numpy(np.stack([np.array(plane) for plane in planes]))
    torch.testing.assert_close(small[0], expected.clamp(0, 1), atol=2e-6, rtol=0)
    back = [Image.fromarray(plane).resize((52, 37), theirs) for plane in small[0].numpy()]
    expected = torch.from_numpy(np.stack([np.array(plane) for plane in back])).clamp(0, 1)
    torch.testing.assert_close(filters.resize(given, scale, mode=mode)[0], expected, atol=2e-6, rtol=0)


def test_a_size_of_one_pixel():
    assert filters.resize(noise(1, 3, 3, 4), 0.1).shape == (1, 3, 3, 4)


def test_filters_of_windows_are_the_ops():
    given = noise(2, 3, 20, 24)
    assert torch.equal(filters.median(given, 5), ops.median_filter(given, 5))
    assert torch.equal(filters.bilateral(given), ops.bilateral_filter(given, 9, 75 / 255, 75))
    found = filters.total_variation(given, 0.2, iterations=7, isotropic=False)
    assert torch.equal(found, ops.total_variation(given, 0.2, iterations=7, isotropic=False).clamp(0, 1))


def windows(x: np.ndarray, y: int, z: int, radius: int) -> np.ndarray:
    """(3, pixels) of the box around (y, z)."""
    rows, columns = slice(max(0, y - radius), y + radius + 1), slice(max(0, z - radius), z + radius + 1)
    return x[:, rows, columns].reshape(3, -1)


@pytest.mark.parametrize("eps", [0.1**2, (4 / 255) ** 2])
def test_guided_is_its_formula(eps):
    guide, given = noise(2, 3, 9, 12, dtype=torch.float64).numpy()
    guide[1] = guide[0] + 0.01 * guide[1]  # colours that go together make the systems hard
    a, b = np.zeros((3, 3, 9, 12)), np.zeros((3, 9, 12))
    for y, z in np.ndindex(9, 12):
        around, values = windows(guide, y, z, 2), windows(given, y, z, 2)
        mean, count = around.mean(1), around.shape[1]
        covariance = (around @ around.T) / count - np.outer(mean, mean) + eps * np.eye(3)
        right = (around @ values.T) / count - np.outer(mean, values.mean(1))
        a[:, :, y, z] = np.linalg.solve(covariance, right)
        b[:, y, z] = values.mean(1) - mean @ a[:, :, y, z]
    expected = np.zeros((3, 9, 12))
    for y, z in np.ndindex(9, 12):
        means = np.stack([windows(each, y, z, 2).mean(1) for each in a])
        expected[:, y, z] = guide[:, y, z] @ means + windows(b, y, z, 2).mean(1)
    pictures = [torch.from_numpy(each)[None].float() for each in (given, guide.clip(0, 1))]
    found = filters.guided(pictures[0], 2, eps, guide=pictures[1])
    torch.testing.assert_close(found[0].double(), torch.from_numpy(expected).clamp(0, 1), atol=1e-3, rtol=0)
    assert (found[0].double() - torch.from_numpy(expected).clamp(0, 1)).abs().mean() < 1e-4


def test_guided_keeps_edges_and_smooths_the_rest():
    step = (torch.arange(32) >= 16).float().expand(1, 3, 32, 32) * 0.8 + 0.1
    noisy = (step + 0.05 * (noise(1, 3, 32, 32) - 0.5)).clamp(0, 1)
    found = filters.guided(noisy, 4, 0.1**2)
    assert (found - step).abs().mean() < 0.5 * (noisy - step).abs().mean()
    assert (found[..., 16] - found[..., 15]).mean() > 0.75
    torch.testing.assert_close(filters.guided(noisy, 2, 1e-9), noisy, atol=1e-4, rtol=0)
    means = F.avg_pool2d(noisy, 5, 1, 2, count_include_pad=False)
    means = F.avg_pool2d(means, 5, 1, 2, count_include_pad=False)
    torch.testing.assert_close(filters.guided(noisy, 2, 1e6), means, atol=1e-5, rtol=0)


def test_adverse_cleaner_is_its_parts():
    given = smooth(1, 3, 24, 32) / 2 + 0.25  # nothing to clamp between the parts
    found = filters.adverse_cleaner(given, iterations=3, guided_iterations=2)
    expected = given
    for _ in range(3):
        expected = filters.bilateral(expected, 5, 8 / 255, 8.0)
    for _ in range(2):
        expected = filters.guided(expected, 4, (4 / 255) ** 2, guide=given)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


# --- Total variance minimization

# The optimum that cvxpy 1.9.3 with Clarabel finds for `case()`, tolerances 1e-10:
#   z = [cp.Variable((16, 16)) for _ in range(3)]
#   fidelity = cp.norm(cp.hstack([cp.vec(cp.multiply(kept[k], z[k] - x[k]), order="C") for k in range(3)]))
#   tv = lambda p: cp.sum(cp.norm(p[1:] - p[:-1], axis=1)) + cp.sum(cp.norm(p[:, 1:] - p[:, :-1], axis=0))
#   guo = sum(tv(each) for each in z);  ds = tv of the columns z[k][:, j], ordered by j and then k
#   cp.Problem(cp.Minimize(fidelity + lamb * guo)).solve(solver=cp.CLARABEL)
OPTIMA = {
    ("guo", 0.01): 0.41833920542105196,
    ("guo", 0.03): 1.2550176156252861,
    ("guo", 0.1): 3.5137598965663206,
    ("guo", 0.2): 3.610318417912257,
    ("ds", 0.01): 0.4069431091736003,
    ("ds", 0.03): 1.220829327475897,
    ("ds", 0.1): 3.3567279040946447,
    ("ds", 0.2): 3.6123949283826278,
}


def case() -> tuple[Tensor, Tensor]:
    """A picture and what is kept of it, (1, 3, 16, 16) float64 and bool."""
    k, i, j = torch.meshgrid(torch.arange(3), torch.arange(16), torch.arange(16), indexing="ij")
    waves = 0.3 * (0.9 * i.double() + k).sin() * (0.7 * j.double()).cos()
    x = 0.5 + waves + ((37 * i + 61 * j + 23 * k) % 7 - 3) / 40
    return x[None], ((7 * i + 11 * j + 5 * k) % 10 >= 3)[None]


def objective(z: Tensor, x: Tensor, kept: Tensor, lamb: float, variant: str) -> float:
    fidelity = torch.linalg.vector_norm(kept * (z - x))
    planes = z[0] if variant == "guo" else z[0].permute(1, 2, 0).reshape(1, 16, 48)
    rows = torch.linalg.vector_norm(planes.diff(dim=1), dim=2).sum()
    columns = torch.linalg.vector_norm(planes.diff(dim=2), dim=1).sum()
    return float(fidelity + lamb * (rows + columns))


@pytest.mark.parametrize(("variant", "lamb"), OPTIMA)
def test_tvm_finds_the_optimum_of_a_convex_solver(variant, lamb):
    x, kept = case()
    best = OPTIMA[variant, lamb]
    exact = objective(solve(x, kept, lamb, 3000, joined=variant == "ds"), x, kept, lamb, variant)
    assert -1e-8 < exact / best - 1 < 1e-6
    usual = solve(x.float(), kept, lamb, 300, joined=variant == "ds").double()
    assert objective(usual, x, kept, lamb, variant) / best - 1 < 2e-4


@pytest.mark.parametrize("variant", ["guo", "ds"])
def test_tvm_descends(variant):
    x, kept = case()
    found = [
        objective(solve(x, kept, 0.1, count, joined=variant == "ds"), x, kept, 0.1, variant)
        for count in (3, 10, 100, 1000)
    ]
    assert found == sorted(found, reverse=True) and found[0] < objective(x, x, kept, 0.1, variant)


def test_what_tvm_keeps_and_what_it_guesses():
    x, kept = case()
    small = solve(x, kept, 0.01, 1000)
    assert (small - x)[kept].abs().max() < 1e-6  # 0.01 sqrt(8 * 90) < 1
    assert (small - x)[~kept].abs().max() > 0.1
    other = torch.where(kept, x, 0.5)  # nothing depends on what was dropped
    torch.testing.assert_close(solve(other, kept, 0.01, 1000), small, atol=1e-5, rtol=0)


def test_tvm_without_a_reason_to_change():
    given = noise(2, 3, 20, 28)
    assert torch.equal(filters.tvm(given, 0.0, 0.0, size=None), given)
    torch.testing.assert_close(filters.tvm(given, 0.01, 0.0, size=None), given, atol=1e-6, rtol=0)
    assert torch.equal(filters.tvm(given, seed=3), filters.tvm(given, seed=[3, 4]))
    assert not torch.equal(filters.tvm(given, seed=3), filters.tvm(given, seed=4))


def test_tvm_works_at_its_size():
    given = smooth(1, 3, 64, 64)
    small = F.interpolate(given, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    inner = filters.tvm(small, 0.05, 0.1, size=None)
    back = F.interpolate(inner, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(filters.tvm(given, 0.05, 0.1, size=32), back)


# --- What they are for


@pytest.mark.parametrize(
    ("filter", "left"),
    [
        (partial(filters.gaussian, sigma=1), 0.4),
        (filters.median, 0.75),
        (filters.bilateral, 0.6),
        (filters.guided, 0.6),
        (filters.total_variation, 0.6),
        (filters.adverse_cleaner, 0.6),
        (filters.compress_and_resize, 0.9),
    ],
)
def test_noise_goes_and_the_subject_stays(filter, left):
    trial = testbed.subject_trial(0)
    clean = trial.pictures[:4]
    noisy = (clean + 8 / 255 * (2 * noise(*clean.shape) - 1)).clamp(0, 1)
    cleaned, again = filter(noisy), filter(clean)
    assert (cleaned - again).square().mean() < left**2 * (noisy - clean).square().mean()
    assert (trial.identity(again) > 0.5).all()
