from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opchecks import STORAGE, assert_kernel_close, layouts
from pumice import ops


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    smooth = torch.linspace(0, 1, shape[-1]) * torch.linspace(0.3, 1, shape[-2])[:, None]
    return (smooth + 0.1 * torch.randn(shape, generator=g)).to(device, dtype)


def run(images: Tensor, size: int = 5, sigma_color: float = 0.2, sigma_space: float = 1.5) -> Tensor:
    return ops.bilateral_filter(images, size, sigma_color, sigma_space)


def check(images: Tensor, *args: Any) -> Tensor:
    """The chosen backend against plain torch and float64."""
    actual = run(images, *args)
    with ops.backend("torch"):
        plain = run(images, *args)
        exact = run(images.double(), *args)
    assert actual.dtype == images.dtype
    assert actual.stride() == plain.stride() == torch.empty_like(images).stride()
    # The exponent is as large as it takes to lose a weight, and its rounding is the weight's.
    assert_kernel_close(actual, plain, exact, factor=4.0)
    return actual


def mirrored(i: int, n: int) -> int:
    while not 0 <= i < n:
        i = -i if i < 0 else 2 * (n - 1) - i
    return i


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 5, 9])
def test_reference_is_the_formula(size: int, channels: int) -> None:
    x = inputs((1, channels, 6, 5), "cpu").double()
    with ops.backend("torch"):
        out = run(x, size)
    radius = size // 2
    for i in range(6):
        for j in range(5):
            total, weights = torch.zeros(channels, dtype=torch.float64), 0.0
            for di in range(-radius, radius + 1):
                for dj in range(-radius, radius + 1):
                    if math.hypot(di, dj) > radius:
                        continue
                    other = x[0, :, mirrored(i + di, 6), mirrored(j + dj, 5)]
                    d = (x[0, :, i, j] - other).abs().sum().item()
                    weight = math.exp(-(di**2 + dj**2) / (2 * 1.5**2)) * math.exp(-(d**2) / (2 * 0.2**2))
                    total, weights = total + weight * other, weights + weight
            torch.testing.assert_close(out[0, :, i, j], total / weights)


@pytest.mark.parametrize("size", [1, 3, 5, 9])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_kernel(kernel: str, device: str, dtype: torch.dtype, size: int) -> None:
    check(inputs((1, 3, 9, 37), device, dtype), size)


def test_largest_disc(kernel: str, device: str) -> None:
    check(inputs((1, 3, 9, 17), device), 31, 0.5, 9.0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_and_sigmas(kernel: str, device: str, channels: int) -> None:
    x = inputs((2, channels, 9, 18), device)
    for sigma_color, sigma_space in ((1e-6, 1.0), (0.01, 0.5), (0.5, 1e6), (1e6, 2.0), (8 / 255, 1e-6)):
        check(x, 5, sigma_color, sigma_space)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3, 1, 20), (1, 3, 20, 1), (1, 3, 2, 3)], ids=str)
def test_smaller_than_the_disc(kernel: str, device: str, shape: tuple[int, ...]) -> None:
    for size in (3, 9):
        check(inputs(shape, device), size)


def test_tails(kernel: str, device: str) -> None:
    for tail in range(17):
        check(inputs((1, 1, 3, 16 + tail), device), 3)


def test_more_than_one_tile(kernel: str, device: str) -> None:
    check(inputs((1, 3, 4, 530), device), 5)
    check(inputs((2, 1, 135, 7), device), 5)


def test_layouts(kernel: str, device: str) -> None:
    g = torch.Generator().manual_seed(1)
    for _, x in layouts(lambda *s: torch.rand(s, generator=g).to(device), (2, 3, 5, 7)):
        check(x)


def test_empty(kernel: str, device: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
        assert run(torch.empty(shape, device=device)).shape == shape


def test_nan_stays_within_its_disc(kernel: str, device: str) -> None:
    x = inputs((1, 3, 20, 40), device)
    x[0, 1, 9, 12] = torch.nan
    nan = check(x).isnan()
    assert nan.sum() == 3 * 13  # the pixels of a disc of diameter 5, in all channels
    assert nan[0, :, 9, 10:15].all()


def test_limits(kernel: str, device: str) -> None:
    """Without colours it is a Gaussian blur over the disc; a narrow sigma changes nothing."""
    x = inputs((1, 1, 12, 20), device)
    offsets = torch.arange(5) - 2
    squared = offsets[:, None] ** 2 + offsets**2
    weights = torch.exp(-squared / (2 * 1.5**2)) * (squared <= 4)
    weights = (weights / weights.sum()).to(device)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, weights[None, None])
    torch.testing.assert_close(run(x, 5, 1e4), blurred, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(x, 5, 1e-6), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(run(x, 5, 0.2, 1e-6), x, rtol=1e-6, atol=1e-6)


def test_keeps_edges_and_smooths_between_them(kernel: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    edge = torch.zeros(1, 3, 24, 32, device=device)
    edge[..., 16:] = 1
    noisy = edge + 0.02 * torch.randn(edge.shape, generator=g).to(device)
    out = run(noisy, 9, 0.2, 3.0)
    assert (out - edge).square().mean() < 0.1 * (noisy - edge).square().mean()
    assert (out[..., 16] - out[..., 15]).min() > 0.9


def test_same_bits_for_any_number_of_threads() -> None:
    x = inputs((2, 3, 200, 60), "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck(device: str) -> None:
    x = inputs((2, 3, 5, 7), device)
    for images in (x, x.to(memory_format=torch.channels_last), x[..., ::2]):
        torch.library.opcheck(torch.ops.pumice.bilateral_filter.default, (images, 5, 0.1, 2.0))


@pytest.mark.real_empty
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(device: str, backend: str) -> None:
    def twice(x: Tensor) -> Tensor:
        return run(run(x * 2, 3), 5) + 1

    x = inputs((1, 2, 8, 9), device)
    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), twice(x))


def test_the_widest_sigmas_weigh_all_alike(kernel: str, device: str) -> None:
    x = inputs((1, 3, 9, 8), device)
    wide = run(x, 5, 10**30, np.float32(1e15))  # type: ignore[arg-type]
    with ops.backend("torch"):
        torch.testing.assert_close(wide, run(x, 5, 1e15, 1e30), rtol=1e-5, atol=1e-5)


def test_no_gradient_flows(device: str) -> None:
    assert not run(inputs((1, 3, 4, 4), device).requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": [0.0]}, TypeError, "^images must be a tensor, not list"),
        ({"images": torch.zeros(1, 3, 4, 4).int()}, TypeError, "^images is int32"),
        ({"images": torch.zeros(3, 4, 4)}, ValueError, r"^images: got shape \(3, 4, 4\)"),
        ({"images": torch.zeros(1, 5, 4, 4)}, ValueError, "^images: got 5 channels, expected 1 to 4"),
        ({"size": 6}, ValueError, "^size: got 6, expected an odd number from 1 to 31"),
        ({"size": 33}, ValueError, "^size: got 33"),
        ({"size": "5"}, TypeError, "^size: got str"),
        ({"sigma_color": 0.0}, ValueError, "^sigma_color: got 0.0, expected a number from"),
        ({"sigma_color": "8"}, TypeError, "^sigma_color: got str, expected a number"),
        ({"sigma_space": -1}, ValueError, "^sigma_space: got -1"),
        ({"sigma_space": 1e200}, ValueError, r"^sigma_space: got 1e\+200, expected .* to 1e\+30"),
        ({"sigma_space": 10**400}, ValueError, "^sigma_space: got 1000"),
        ({"sigma_space": float("inf")}, ValueError, "^sigma_space: got inf"),
        ({"sigma_space": float("nan")}, ValueError, "^sigma_space: got nan"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"images": torch.zeros(1, 3, 4, 4), "size": 5, "sigma_color": 0.1, "sigma_space": 2.0}
    with pytest.raises(error, match=message) as raised:
        ops.bilateral_filter(**(arguments | change))
    assert "\n" not in str(raised.value)
