from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opchecks import STORAGE, layouts
from pumice import ops
from pumice.ops.median_filter import WINDOWS, reference


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values of both signs and many sizes, some of them equal."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * 10.0 ** torch.randint(-6, 4, shape, generator=g)
    x[torch.rand(shape, generator=g) < 0.2] = 0.25
    return x.to(device, dtype)


def check(images: Tensor, size: int) -> Tensor:
    """The chosen backend against plain torch, to the bit; a median is one of its values in float64, too."""
    actual = ops.median_filter(images, size)
    with ops.backend("torch"):
        plain = ops.median_filter(images, size)
        exact = ops.median_filter(images.double(), size)
    assert actual.dtype == images.dtype
    assert actual.stride() == plain.stride() == torch.empty_like(images).stride()
    torch.testing.assert_close(actual, plain, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=0, equal_nan=True)
    return actual


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_reference_is_the_median(size: int) -> None:
    x = inputs((2, 2, 6, 5), "cpu").double()
    radius = size // 2
    with ops.backend("torch"):
        out = ops.median_filter(x, size)
    for b, c, i, j in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        window = [
            x[b, c, min(max(i + di, 0), 5), min(max(j + dj, 0), 4)].item()
            for di in range(-radius, radius + 1)
            for dj in range(-radius, radius + 1)
        ]
        assert out[b, c, i, j] == statistics.median(window)


@pytest.mark.parametrize("size", [1, 3, 5, 7, 9, 11, 13, 15])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_kernel(kernel: str, device: str, dtype: torch.dtype, size: int) -> None:
    check(inputs((1, 2, 5, 37), device, dtype), size)


@pytest.mark.parametrize("size", [3, 7, 15])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1, 40), (1, 1, 40, 1), (1, 1, 2, 3)], ids=str)
def test_smaller_than_the_window(kernel: str, device: str, shape: tuple[int, ...], size: int) -> None:
    check(inputs(shape, device), size)


def test_tails(kernel: str, device: str) -> None:
    for tail in range(17):
        check(inputs((1, 1, 4, 16 + tail), device), 5)


@pytest.mark.parametrize(("size", "width"), [(3, 1100), (5, 600), (9, 300)])
def test_more_than_one_tile(kernel: str, device: str, size: int, width: int) -> None:
    check(inputs((1, 1, 1, width), device), size)
    check(inputs((1, 1, 1, width), device, torch.float16), size)
    check(inputs((2, 1, 135, 1), device), size)


def test_layouts(kernel: str, device: str) -> None:
    g = torch.Generator().manual_seed(1)
    for _, x in layouts(lambda *s: torch.rand(s, generator=g).to(device), (2, 3, 5, 7)):
        check(x, 3)


def test_empty(kernel: str, device: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
        assert ops.median_filter(torch.empty(shape, device=device), 3).shape == shape


def test_the_reference_works_by_strips() -> None:
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                self.seen = max(self.seen, found.numel())
            return found

    x = inputs((2, 3, 90, 80), "cpu").double()
    with Largest() as largest:
        out = reference(x, 15)
    assert largest.seen <= WINDOWS < x.numel() * 15**2
    expected = ndimage.median_filter(x.numpy(), (1, 1, 15, 15), mode="nearest")
    torch.testing.assert_close(out, torch.from_numpy(expected), rtol=0, atol=0)


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_nan_and_infinity(kernel: str, device: str, dtype: torch.dtype, size: int) -> None:
    x = inputs((1, 1, 20, 24), device, dtype)
    x[0, 0, 1::3, ::2], x[0, 0, ::3, 1::2] = torch.inf, -torch.inf
    assert not check(x, size).isnan().any()
    radius = size // 2
    for sign in (1.0, -1.0):
        x[0, 0, 9, 12] = torch.tensor(torch.nan).copysign(torch.tensor(sign))
        nan = check(x, size).isnan()
        assert nan[0, 0, 9 - radius : 10 + radius, 12 - radius : 13 + radius].all()
        assert nan.sum() == size**2


def test_laws_of_medians(kernel: str, device: str) -> None:
    x = inputs((1, 1, 8, 21), device)
    for size in (3, 7):
        y = ops.median_filter(x, size)
        assert torch.equal(ops.median_filter(-x, size), -y)
        assert torch.equal(ops.median_filter(x.exp(), size), y.exp())  # any increasing function
        assert torch.equal(ops.median_filter(x.flip(3), size), y.flip(3))
        assert torch.equal(ops.median_filter(x.transpose(2, 3), size), y.transpose(2, 3))
    step = torch.zeros(1, 1, 8, 21, device=device)
    step[..., 10:] = 1
    assert torch.equal(ops.median_filter(step, 5), step)  # an edge stays where it is
    speck = torch.zeros(1, 1, 8, 21, device=device)
    speck[0, 0, 3:6, 8:11] = 1
    assert not ops.median_filter(speck, 5).any()


def test_same_bits_for_any_number_of_threads() -> None:
    x = inputs((2, 3, 200, 300), "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.median_filter(x, 5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck(device: str) -> None:
    x = inputs((2, 3, 5, 7), device)
    for images in (x, x.to(memory_format=torch.channels_last), x[..., ::2]):
        torch.library.opcheck(torch.ops.pumice.median_filter.default, (images, 3))


@pytest.mark.real_empty
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(device: str, backend: str) -> None:
    def twice(x: Tensor) -> Tensor:
        return ops.median_filter(ops.median_filter(x * 2, 3), 5) + 1

    x = inputs((1, 2, 8, 9), device)
    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), twice(x))


def test_no_gradient_flows(device: str) -> None:
    assert not ops.median_filter(inputs((1, 1, 4, 4), device).requires_grad_(), 3).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": [0.0]}, TypeError, "^images must be a tensor, not list"),
        ({"images": torch.zeros(1, 1, 4, 4).long()}, TypeError, "^images is int64"),
        ({"images": torch.zeros(4, 4)}, ValueError, r"^images: got shape \(4, 4\), expected \(B, C, H, W\)"),
        ({"images": torch.zeros(1, 1, 4, 4, device="meta")}, ValueError, "^images is on meta"),
        ({"size": 4}, ValueError, "^size: got 4, expected an odd number from 1 to 15"),
        ({"size": 17}, ValueError, "^size: got 17"),
        ({"size": -1}, ValueError, "^size: got -1"),
        ({"size": 3.0}, TypeError, "^size: got float"),
        ({"size": True}, TypeError, "^size: got bool"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        ops.median_filter(**{"images": torch.zeros(1, 1, 4, 4), "size": 3, **change})
    assert "\n" not in str(raised.value)
