"""The op against float64, autograd and the formulas of the standard; against a real codec: see
tests/protect/test_transforms.py."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import fft, ndimage
from torch import Tensor
from torch.nn import functional as F

from opchecks import STORAGE, assert_kernel_close, layouts
from pumice import ops
from pumice.ops.differentiable_jpeg import _coded, quantization_tables, reference_backward


def inputs(shape: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Smooth, with noise, and here and there beyond black and white when it comes back."""
    g = torch.Generator().manual_seed(0)
    waves = F.interpolate(torch.rand(*shape[:2], 5, 4, generator=g), shape[2:], mode="bilinear")
    return (waves + 0.15 * torch.randn(shape, generator=g)).clamp(0, 1).to(device, dtype)


def gradient_of(images: Tensor) -> Tensor:
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(7)).to(images)


def run(images: Tensor, quality: int | Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = images.detach().requires_grad_()
    out = ops.differentiable_jpeg(leaf, quality)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def undecided(images: Tensor, quality: Tensor) -> Tensor:
    """(B, 1, H, W): pixels near a coefficient that float32 may round to another level than float64 does, or
    near a value that it may clamp."""
    values, levels = _coded(images.double(), quantization_tables(quality))
    height, width = images.shape[2:]
    marks = torch.zeros(len(images), 1, -(-height // 16), -(-width // 16), dtype=torch.float64)
    for each, blocks in zip(levels, (2, 1), strict=True):
        near = ((each - each.round()).abs() > 0.5 - 5e-5).flatten(4).any(4).amax(1, keepdim=True)
        marks += F.max_pool2d(near.double(), blocks)
    edge = ((values * (1 - values)).abs() < 1e-5).any(1, keepdim=True)
    edge = F.pad(edge.double(), (0, -width % 16, 0, -height % 16))
    marks = F.max_pool2d(marks + F.max_pool2d(edge, 16), 3, stride=1, padding=1)
    return (marks.repeat_interleave(16, 2).repeat_interleave(16, 3) > 0)[:, :, :height, :width]


def check(images: Tensor, quality: int | Tensor = 75, grad: Tensor | None = None) -> float:
    """The chosen backend against plain torch and float64, where both round to the same levels: gives the
    share of the pixels that is looked at."""
    grad = gradient_of(images) if grad is None else grad
    actual = run(images, quality, grad)
    with ops.backend("torch"):
        plain = run(images, quality, grad)
        exact = run(images.double(), quality, grad.double())
    qualities = torch.as_tensor(quality).cpu().expand(len(images))
    mask = undecided(images.cpu(), qualities).to(images.device)
    scales = (None, 100 * grad.abs().max().item())  # sums over a block, and slopes of levels of up to 1000
    for a, p, e, scale in zip(actual, plain, exact, scales, strict=True):
        assert a.dtype == images.dtype
        assert a.stride() == torch.empty_like(images).stride()
        assert_kernel_close(*(t.masked_fill(mask, 0) for t in (a, p, e)), factor=4, scale=scale)
    return 1 - mask.double().mean().item()


def test_backward_is_the_reference_differentiated() -> None:
    for shape in ((2, 3, 32, 48), (1, 3, 37, 21), (1, 3, 1, 1)):
        images = inputs(shape).double().requires_grad_()
        tables = quantization_tables(torch.full((shape[0],), 60))
        grad = gradient_of(images)
        values = _coded(images, tables)[0].clamp(0, 1)
        assert shape[2] < 32 or (values == 0).any() or (values == 1).any()
        (expected,) = torch.autograd.grad(values, images, grad)
        found = reference_backward(grad, images.detach(), tables)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_quantization_tables_are_those_of_pillow() -> None:
    for quality in range(1, 101):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
        tables = Image.open(file).quantization  # in rows since Pillow 8.3
        expected = torch.tensor([tables[0], tables[1]]).view(1, 2, 8, 8)
        assert torch.equal(quantization_tables(torch.tensor([quality])), expected.float()), quality


def numpy_jpeg(image: np.ndarray, quality: int, rounded: Any) -> np.ndarray:
    """JPEG of (3, 16, 16) in [0, 1] from the formulas of the standard, float64."""
    tables = quantization_tables(torch.tensor([quality]))[0].double().numpy()
    to = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    y, cb, cr = np.einsum("ij,jhw->ihw", to, 255 * image) - np.array([128, 0, 0])[:, None, None]

    def coded(plane: np.ndarray, table: np.ndarray) -> np.ndarray:
        out = np.empty_like(plane)
        for i in range(0, plane.shape[0], 8):
            for j in range(0, plane.shape[1], 8):
                level = fft.dctn(plane[i : i + 8, j : j + 8], norm="ortho") / table
                out[i : i + 8, j : j + 8] = fft.idctn(rounded(level) * table, norm="ortho")
        return out

    def half(plane: np.ndarray) -> np.ndarray:
        return plane.reshape(8, 2, 8, 2).mean((1, 3))

    def twice(plane: np.ndarray) -> np.ndarray:
        return ndimage.zoom(plane, 2, order=1, mode="nearest", grid_mode=True)

    y = coded(y, tables[0]) + 128
    cb, cr = (twice(coded(half(plane), tables[1])) for plane in (cb, cr))
    rgb = [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]
    return np.clip(np.stack(rgb) / 255, 0, 1)


@pytest.mark.parametrize("quality", [30, 80])
def test_it_and_its_gradient_are_those_of_the_formulas(quality: int) -> None:
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = 0.3 + 0.4 * noise
    expected = numpy_jpeg(image[0].numpy(), quality, np.round)
    found = ops.differentiable_jpeg(image, quality)[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)  # the standard's six digits

    levels: list[np.ndarray] = []
    numpy_jpeg(image[0].numpy(), quality, lambda x: levels.append(np.round(x)) or levels[-1])

    def soft() -> Any:
        whole = iter(levels)  # of the unmoved picture: the branch of the cubic that it is on
        return lambda x: (r := next(whole)) + (x - r) ** 3

    rng, h = np.random.default_rng(0), 1e-6
    for _ in range(3):
        direction, weight = rng.normal(size=(2, 3, 16, 16))
        ends = [numpy_jpeg(image[0].numpy() + s * direction, quality, soft()) for s in (h, -h)]
        slope = (weight * (ends[0] - ends[1])).sum() / (2 * h)
        gradient = run(image, quality, torch.from_numpy(weight)[None])[1]
        assert (gradient[0].numpy() * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-2)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 33, 40), (1, 3, 64, 48)], ids=str)
def test_kernel(kernel: str, device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert check(inputs(shape, device, dtype)) > 0.2


def test_sides_of_any_length(kernel: str, device: str) -> None:
    sides = (2, 17, 33) if kernel == "triton" else (*range(2, 20), 31, 32, 33)
    looked_at = [check(inputs((1, 3, 5, side), device), 30) for side in sides]
    looked_at += [check(inputs((1, 3, side, 6), device), 30) for side in sides]
    assert sum(looked_at) > 0.9 * len(looked_at)


def test_wider_than_a_tile(kernel: str, device: str) -> None:
    for width in (65,) if kernel == "triton" else (255, 256, 257, 530):
        assert check(inputs((1, 3, 20, width), device), 20) > 0.5


def test_each_picture_has_its_own_quality(kernel: str, device: str) -> None:
    images = inputs((3, 3, 24, 30), device)
    qualities = torch.tensor([10, 50, 95], device=device)
    check(images, qualities)
    together = ops.differentiable_jpeg(images, qualities)
    assert torch.equal(together, ops.differentiable_jpeg(images, quantization_tables(qualities)))
    for i, quality in enumerate(qualities.tolist()):
        assert torch.equal(together[i : i + 1], ops.differentiable_jpeg(images[i : i + 1], quality))


def test_layouts(kernel: str, device: str) -> None:
    g = torch.Generator().manual_seed(1)
    found = [x for _, x in layouts(lambda *s: torch.rand(s, generator=g).to(device), (2, 3, 20, 18))]
    for images, grad in zip(found, (*found[1:], found[0]), strict=True):
        check(images, 10, grad)


def test_empty(kernel: str, device: str) -> None:
    for shape in ((0, 3, 16, 16), (2, 3, 0, 16), (2, 3, 16, 0)):
        for backend, dtype in ((kernel, torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
            images = torch.empty(shape, device=device, dtype=dtype)
            with ops.backend(backend):
                out, gradient = run(images, 75, images)
            assert out.shape == gradient.shape == shape


def test_numbers_of_numpy() -> None:
    images = inputs((1, 3, 16, 16))
    found = ops.differentiable_jpeg(images, np.int64(75))  # type: ignore[arg-type]
    assert torch.equal(found, ops.differentiable_jpeg(images, 75))


def test_what_is_even_stays_even(kernel: str, device: str) -> None:
    grey = torch.rand(2, 1, 1, 1, generator=torch.Generator().manual_seed(0)).expand(2, 3, 40, 24).to(device)
    for quality in (100, 75, 5):
        step = quantization_tables(torch.tensor([quality]))[0, 0, 0, 0].item() / 8
        found = ops.differentiable_jpeg(grey, quality)
        assert (found - found[:, :1, :1, :1]).abs().max() < 1e-6
        assert (found - grey).abs().max() * 255 <= step / 2 + 1e-3


def test_no_gradient_comes_back_where_the_result_was_clamped(kernel: str, device: str) -> None:
    images = inputs((1, 3, 32, 32), device)
    out = ops.differentiable_jpeg(images, 30)
    clamped = (out == 0) | (out == 1)
    assert 0 < clamped.double().mean() < 0.5
    assert run(images, 30, clamped.float())[1].eq(0).all()


def test_nan_spreads_over_its_blocks_and_to_their_neighbours(kernel: str, device: str) -> None:
    images = inputs((2, 3, 48, 64), device)
    images[0, 1, 20, 35] = torch.nan
    nan = ops.differentiable_jpeg(images, 50).isnan()
    assert nan[0, :, 15:33, 31:49].all()  # chroma of the macroblock, interpolated to one pixel around
    nan[0, :, 15:33, 31:49] = False
    if kernel == "triton":  # whose products run over 32 x 32 pixels
        nan[0, :, :33, 31:] = False
    assert not nan.any()


def test_same_bits_for_any_number_of_threads() -> None:
    images = inputs((2, 3, 200, 300))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(torch.stack(run(images, 75, images)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck(device: str) -> None:
    images = inputs((2, 3, 17, 20), device)
    tables = quantization_tables(torch.tensor([30, 80], device=device))
    other = images.half().to(memory_format=torch.channels_last)
    op, backward = torch.ops.pumice.differentiable_jpeg, torch.ops.pumice.differentiable_jpeg_backward
    torch.library.opcheck(op.default, (images.clone().requires_grad_(), tables))
    torch.library.opcheck(op.default, (other, tables))
    torch.library.opcheck(backward.default, (images, other, tables))
    torch.library.opcheck(backward.default, (other, images[..., ::2].repeat(1, 1, 1, 2), tables))


@pytest.mark.real_empty
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(device: str, backend: str) -> None:
    images = inputs((2, 3, 16, 16), device).requires_grad_()
    tables = quantization_tables(torch.tensor([30, 60], device=device))
    others = () if backend == "inductor" else (80, torch.tensor([30, 60], device=device))
    for quality in (tables, *others):

        def f(images: Tensor, quality: int | Tensor) -> Tensor:
            return ops.differentiable_jpeg(images * 0.9, quality).square().mean()

        compiled = torch.compile(f, fullgraph=True, backend=backend)(images, quality)
        expected = torch.autograd.grad(f(images, quality), images)
        torch.testing.assert_close(torch.autograd.grad(compiled, images), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(1, 3, 8, 8).long()}, TypeError, "^images is int64"),
        ({"images": torch.zeros(1, 4, 8, 8)}, ValueError, r"^images: got shape \(1, 4, 8, 8\), expected"),
        ({"images": torch.zeros(3, 8, 8)}, ValueError, r"^images: got shape \(3, 8, 8\), expected"),
        ({"quality": 101}, ValueError, "^quality: got 101, expected 1 to 100"),
        ({"quality": torch.zeros(2, 2, 8, 8)}, ValueError, "^quality: got tables with values that are not"),
        ({"quality": torch.ones(2, 2, 8, 8) * 1j}, TypeError, "^quality: got torch.complex64"),
        ({"quality": 50.0}, TypeError, "^quality: got 50.0, expected a whole number"),
        ({"quality": torch.tensor([50, 0])}, ValueError, r"^quality: got \[50, 0\], expected 1 to 100"),
        (
            {"quality": torch.tensor([50, 60, 70])},
            ValueError,
            r"^quality: got shape \(3,\), expected \(\), \(2,\) or \(2, 2, 8, 8\)",
        ),
        ({"quality": torch.ones(2, 2, 8, 8, device="meta")}, ValueError, "^quality: got tables on meta"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.differentiable_jpeg(**{"images": torch.zeros(2, 3, 8, 8), "quality": 75} | change)
