from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opchecks import STORAGE, assert_kernel_close, layouts
from pumice import ops

ISOTROPIC = pytest.mark.parametrize("isotropic", [True, False], ids=["isotropic", "anisotropic"])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def step_picture(height: int, width: int) -> Tensor:
    """(1, 2, H, W) with an edge at a third, upright and lying, and some noise; float64."""
    x = torch.full((1, 2, height, width), 0.2, dtype=torch.float64)
    x[:, 0, :, width // 3 :] = 0.8
    x[:, 1, height // 3 :] = 0.8
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradient(u: Tensor) -> tuple[Tensor, Tensor]:
    right, down = torch.zeros_like(u), torch.zeros_like(u)
    right[..., :-1], down[..., :-1, :] = u.diff(dim=3), u.diff(dim=2)
    return right, down


def minus_adjoint(right: Tensor, down: Tensor) -> Tensor:
    moved = right + down
    moved[..., 1:] -= right[..., :-1]
    moved[..., 1:, :] -= down[..., :-1, :]
    return moved


def objective(u: Tensor, f: Tensor, weight: float, isotropic: bool) -> float:
    right, down = gradient(u.double())
    variation = torch.hypot(right, down) if isotropic else right.abs() + down.abs()
    return (0.5 * (u - f).double().square().sum() + weight * variation.sum()).item()


def certified(f: Tensor, weight: float, isotropic: bool) -> tuple[Tensor, float]:
    """(u, a bound of its objective's distance to the least): projected gradients on the dual, with momentum
    (Beck and Teboulle, 2009), until the duality gap is closed."""

    def project(y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if not isotropic:
            return y[0].clamp(-weight, weight), y[1].clamp(-weight, weight)
        scale = (torch.hypot(*y) / weight).clamp(min=1)
        return y[0] / scale, y[1] / scale

    y = ahead = gradient(torch.zeros_like(f))
    t, gap, u = 1.0, float("inf"), f
    for n in range(20000):
        slopes = gradient(f + minus_adjoint(*ahead))
        new = project((ahead[0] + slopes[0] / 8, ahead[1] + slopes[1] / 8))
        t, before = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
        ahead = tuple(b + (before - 1) / t * (b - a) for a, b in zip(y, new, strict=True))
        y = new
        if n % 100 == 99:
            u = f + minus_adjoint(*y)
            dual = -(u - f).square().sum() / 2 - ((u - f) * f).sum()
            gap = objective(u, f, weight, isotropic) - dual.item()
            if gap < 1e-7:
                break
    return u, gap


def check(images: Tensor, weight: float | Tensor = 0.1, **how: Any) -> None:
    how = {"iterations": 10, **how}
    actual = ops.total_variation(images, weight, **how)
    with ops.backend("torch"):
        plain = ops.total_variation(images, weight, **how)
        exact = ops.total_variation(images.double(), weight, **how)
    assert actual.dtype == images.dtype
    assert actual.stride() == plain.stride() == torch.empty_like(images).stride()
    assert_kernel_close(actual, plain, exact)


@ISOTROPIC
def test_comes_to_what_a_closed_gap_certifies(isotropic: bool) -> None:
    for weight in (0.03, 0.3):
        f = step_picture(12, 15)
        expected, gap = certified(f, weight, isotropic)
        assert 0 <= gap < 1e-6
        u = ops.total_variation(f, weight, iterations=2000, isotropic=isotropic)
        assert objective(u, f, weight, isotropic) - objective(expected, f, weight, isotropic) < 1e-5
        assert (u - expected).square().sum() < 4e-5  # the model is strongly convex


def test_an_edge_moves_by_the_weight_over_its_distance_to_the_border(kernel: str, device: str) -> None:
    f = torch.full((3, 1, 8, 8), 0.2, device=device)
    f[0, :, :, 3:] = f[1, :, 3:] = f[2, :, :, 3:] = 0.8
    expected = torch.where(f == f.min(), 0.2 + 0.1 / 3, 0.8 - 0.1 / 5)
    expected[2] = f[2].mean()  # all that is left beyond 0.6 / (1/3 + 1/5)
    u = ops.total_variation(f, torch.tensor([0.1, 0.1, 2.0], device=device))
    assert (u - expected)[:2].abs().max() < 2e-4
    assert (u - expected)[2].abs().max() < 4e-3


@ISOTROPIC
def test_the_objective_falls_and_the_picture_stays_in_its_range(
    kernel: str, device: str, isotropic: bool
) -> None:
    f = step_picture(24, 33).clamp(0, 1).float().to(device)
    results = [ops.total_variation(f, 0.1, iterations=n, isotropic=isotropic) for n in (1, 3, 10, 40)]
    values = [objective(u, f, 0.1, isotropic) for u in (f, *results)]
    assert sorted(values, reverse=True) == values
    for u in results:
        assert u.min() >= f.min() - 1e-6 and u.max() <= f.max() + 1e-6
        torch.testing.assert_close(u.mean((2, 3)), f.mean((2, 3)))


def test_takes_out_noise(device: str) -> None:
    clean = torch.kron(noise(1, 3, 4, 4), torch.ones(16, 16)).to(device)
    noisy = clean + 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).to(device)
    assert (ops.total_variation(noisy, 0.05) - clean).norm() < 0.4 * (noisy - clean).norm()


@ISOTROPIC
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 33, 37), (1, 2, 70, 16)], ids=str)
def test_kernel(
    kernel: str, device: str, shape: tuple[int, ...], dtype: torch.dtype, isotropic: bool
) -> None:
    check(noise(*shape).to(device, dtype), isotropic=isotropic)


def test_tails(kernel: str, device: str) -> None:
    for side in (*range(1, 19), 31, 32, 33):
        check(noise(1, 1, 3, side).to(device), iterations=3)
        check(noise(1, 1, side, 3).to(device), iterations=3)


def test_any_number_of_iterations(kernel: str, device: str) -> None:
    f = noise(1, 1, 9, 11).to(device)
    for iterations in (1, 2, 7, 8, 9, 17):
        check(f, iterations=iterations)


def test_weight_per_sample(kernel: str, device: str) -> None:
    f = noise(3, 2, 12, 10).to(device)
    weights = torch.tensor([0.3, 0.0, 0.05], device=device)
    check(f, weights)
    together = ops.total_variation(f, weights, iterations=10)
    for i, weight in enumerate(weights.tolist()):
        assert torch.equal(together[i : i + 1], ops.total_variation(f[i : i + 1], weight, iterations=10))


@ISOTROPIC
def test_nothing_to_do_is_exact(kernel: str, device: str, isotropic: bool) -> None:
    f = noise(2, 1, 9, 14).to(device)
    assert torch.equal(ops.total_variation(f, 0.0, iterations=15, isotropic=isotropic), f)
    even = f[..., :1, :1].expand(-1, -1, 9, 14)
    assert torch.equal(ops.total_variation(even, 0.5, iterations=15, isotropic=isotropic), even)


def test_layouts(kernel: str, device: str) -> None:
    g = torch.Generator().manual_seed(1)
    for _, other in layouts(lambda *s: torch.rand(s, generator=g).to(device), (2, 3, 5, 7)):
        check(other, iterations=2)


def test_empty(kernel: str, device: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
        f = torch.empty(shape, device=device)
        assert ops.total_variation(f, 0.1).shape == shape
        with ops.backend("torch"):
            assert ops.total_variation(f, 0.1).shape == ops.total_variation(f.double(), 0.1).shape == shape


@ISOTROPIC
def test_nan_spreads_as_in_the_reference(kernel: str, device: str, isotropic: bool) -> None:
    for row, column in ((4, 5), (0, 0), (11, 13), (11, 0)):
        f = noise(2, 2, 12, 14).to(device)
        f[0, 1, row, column] = torch.nan
        check(f, iterations=3, isotropic=isotropic)
        u = ops.total_variation(f, 0.1, iterations=3, isotropic=isotropic)
        assert u.isnan().flatten(2).any(2).tolist() == [[False, True], [False, False]]


def test_same_bits_for_any_number_of_threads() -> None:
    f = noise(3, 3, 90, 130)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.total_variation(f, 0.1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck(device: str) -> None:
    f = noise(2, 3, 5, 7).to(device)
    weights = torch.tensor([0.1, 0.2], device=device)
    for images in (f, f.half(), f.to(memory_format=torch.channels_last), f[..., ::2]):
        for weight in ((0.1, None), (0.0, weights)):
            torch.library.opcheck(torch.ops.pumice.total_variation.default, (images, *weight, 3, True))


@pytest.mark.real_empty
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(device: str, backend: str) -> None:
    def f(images: Tensor) -> Tensor:
        return ops.total_variation(images * 0.5, 0.1, iterations=5) + 1

    images = noise(1, 3, 8, 8).to(device)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend=backend)(images), f(images))


def test_numbers_of_numpy() -> None:
    f = noise(1, 1, 4, 4)
    found = ops.total_variation(f, 0.1, iterations=np.int32(3))  # type: ignore[arg-type]
    assert torch.equal(found, ops.total_variation(f, 0.1, iterations=3))


def test_no_gradient_flows(device: str) -> None:
    assert not ops.total_variation(noise(1, 1, 4, 4).to(device).requires_grad_(), 0.1).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 4).long()}, TypeError, "^images is int64"),
        ({"images": [0.0]}, TypeError, "^images must be a tensor, not list"),
        ({"images": torch.zeros(3, 4, 4)}, ValueError, r"^images: got shape \(3, 4, 4\), expected"),
        ({"weight": -0.1}, ValueError, "^weight: got -0.1, expected at least 0"),
        ({"weight": float("nan")}, ValueError, "^weight is nan"),
        ({"weight": "much"}, TypeError, "^weight must be a number"),
        ({"weight": torch.ones(3)}, ValueError, r"^weight has shape \(3,\)"),
        ({"iterations": 0}, ValueError, "^iterations: got 0, expected at least 1"),
        ({"weight": torch.ones(2, dtype=torch.complex64)}, TypeError, "^weight: got torch.complex64"),
        ({"iterations": 2**31}, ValueError, "^iterations: got 2147483648, expected at most"),
        ({"isotropic": "no"}, TypeError, "^isotropic: got 'no', expected a bool"),
        ({"iterations": 1.5}, TypeError, "^iterations: got 1.5, expected a whole number"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"images": torch.zeros(2, 3, 4, 4), "weight": 0.1} | change
    with pytest.raises(error, match=message):
        ops.total_variation(arguments.pop("images"), arguments.pop("weight"), **arguments)
