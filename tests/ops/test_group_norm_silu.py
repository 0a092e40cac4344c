from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from opchecks import HALF, STORAGE, assert_kernel_close, layouts
from pumice import ops

GROUPS = 4


def inputs(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(shape, generator=g) + 1
    weight, bias = torch.randn(2, shape[1], generator=g)
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def run(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, groups: int = GROUPS) -> list[Tensor]:
    """y, dx, dweight, dbias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = ops.group_norm_silu(leaves[0], groups, *leaves[1:], eps=1e-5)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = GROUPS,
    dy: Tensor | None = None,
    factor: float = 3.0,
) -> None:
    if dy is None:
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(x)
    actual = run(x, weight, bias, dy, groups)
    with ops.backend("torch"):
        plain = run(x, weight, bias, dy, groups)
        exact = run(*(t.double() for t in (x, weight, bias, dy)), groups)
    assert actual[0].stride() == torch.empty_like(x).stride()
    # The gradients are differences and sums of larger terms, which are what gets rounded.
    variance = x.double().reshape(x.shape[0], groups, -1).var(2, correction=0)
    largest = (dy.abs().max() * weight.abs().max()).double() / (variance.min() + 1e-5).sqrt()
    total = dy.double().abs().flatten(2).sum((0, 2)).max()
    scales = (None, largest.item(), total.item(), total.item())
    for a, p, e, t, scale in zip(actual, plain, exact, (x, x, weight, bias), scales, strict=True):
        assert a.dtype == t.dtype
        assert_kernel_close(a, p, e, factor=factor, scale=max(1.0, scale) if scale else None)


def test_reference_is_torch() -> None:
    x, weight, bias = (t.double().requires_grad_() for t in inputs((2, 8, 5, 7), "cpu"))
    dy = torch.randn(x.shape, dtype=torch.float64)
    with ops.backend("torch"):
        ours = ops.group_norm_silu(x, GROUPS, weight, bias, 1e-5)
        gradients = torch.autograd.grad(ours, (x, weight, bias), dy)
    theirs = F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-5))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs, (x, weight, bias), dy))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (3, 12, 33, 37), (2, 64, 16, 16), (1, 20, 3, 70)], ids=str)
def test_kernel(kernel: str, device: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    x, weight, bias = inputs(shape, device, dtype)
    check(x.to(memory_format=torch.channels_last) if last else x, weight, bias)


def test_tails(kernel: str, device: str) -> None:
    for tail in range(17):
        check(*inputs((1, 8, 16 + tail), device))
        x, weight, bias = inputs((1, 16 + tail, 2, 3), device)
        check(x.to(memory_format=torch.channels_last), weight, bias, groups=1)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_more_than_one_chunk(kernel: str, device: str, last: bool) -> None:
    x, weight, bias = inputs((2, 8, 97, 101), device)
    check(x.to(memory_format=torch.channels_last) if last else x, weight, bias)


def test_groups(kernel: str, device: str) -> None:
    for groups in (1, 2, 12):
        check(*inputs((2, 12, 5, 5), device), groups=groups)


def test_many_channels_last(kernel: str, device: str) -> None:
    # Beyond 4096 the layout is copied; the interpreter would take long over that many channels.
    for channels in (2048,) if kernel == "triton" else (2048, 4100):
        x, weight, bias = inputs((1, channels, 2, 2), device)
        check(x.to(memory_format=torch.channels_last), weight, bias)


def test_layouts(kernel: str, device: str) -> None:
    shape = (2, 8, 5, 7)
    x, weight, bias = inputs(shape, device)
    g = torch.Generator().manual_seed(1)
    for _, other in layouts(lambda *s: torch.randn(s, generator=g).to(device), shape):
        check(other, weight, bias)
        check(x, weight, bias, dy=other)
        check(x.to(memory_format=torch.channels_last), weight, bias, dy=other)
    check(x, weight.repeat(2)[::2], bias.flip(0))


def test_affine_in_another_dtype(kernel: str, device: str) -> None:
    x, weight, bias = inputs((2, 8, 6, 6), device)
    for dtype in HALF:
        check(x.to(dtype), weight, bias)
        check(x, weight.to(dtype), bias.to(dtype))
        check(x.to(dtype), weight, bias.to(dtype))


def test_far_from_zero(kernel: str, device: str) -> None:
    """The variance must not be a difference of two large numbers."""
    for shape in ((1, 8, 32, 32), (2, 8, 70, 70)):
        x, weight, bias = inputs(shape, device)
        check(x + 1000, weight, bias, factor=10)
        check((x + 1000).to(memory_format=torch.channels_last), weight, bias, factor=10)


def test_extremes(kernel: str, device: str) -> None:
    x, weight, bias = inputs((1, 8, 6, 6), device)
    check(x, weight * 200, bias)
    check(x * 1e-8, weight, bias)
    check(torch.full_like(x, 3.0), weight, bias)


def test_empty(kernel: str, device: str) -> None:
    for shape in ((0, 8, 2, 2), (2, 8, 0)):
        x, weight, bias = inputs(shape, device)
        y, dx, dweight, _ = run(x, weight, bias, torch.empty_like(x))
        assert y.shape == dx.shape == shape
        assert dweight.eq(0).all()


def test_nan_stays_in_its_group(kernel: str, device: str) -> None:
    x, weight, bias = inputs((2, 8, 6, 6), device)
    x[0, 2, 3, 3] = torch.nan
    for layout in (torch.contiguous_format, torch.channels_last):
        y = ops.group_norm_silu(x.contiguous(memory_format=layout), GROUPS, weight, bias)
        assert y.isnan().flatten(2).all(2).tolist() == [[c in (2, 3) for c in range(8)], [False] * 8]
        assert y.isnan().sum() == 2 * 36


def test_only_the_gradients_asked_for(kernel: str, device: str) -> None:
    x, weight, bias = inputs((2, 8, 6, 6), device)
    y = ops.group_norm_silu(x.requires_grad_(), GROUPS, weight, bias)
    assert y.requires_grad
    saved = [t for t in y.grad_fn.saved_tensors if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    bias.requires_grad_()
    (dbias,) = torch.autograd.grad(ops.group_norm_silu(x.detach(), GROUPS, weight, bias).sum(), bias)
    assert dbias.shape == (8,)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads(last: bool) -> None:
    x, weight, bias = inputs((2, 16, 160, 160), "cpu")
    x = x.to(memory_format=torch.channels_last) if last else x
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(x, weight, bias, x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradcheck(device: str) -> None:
    tensors = [t.double().requires_grad_() for t in inputs((2, 4, 3, 2), device)]
    assert torch.autograd.gradcheck(lambda x, w, b: ops.group_norm_silu(x, 2, w, b, 1e-3), tensors)


def test_opcheck(device: str) -> None:
    x, weight, bias = inputs((2, 8, 5, 7), device)
    for t in (x, x.to(memory_format=torch.channels_last).half(), x[..., ::2]):
        op = torch.ops.pumice.group_norm_silu.default
        torch.library.opcheck(op, (t, weight, bias, GROUPS, 1e-5))
        torch.library.opcheck(
            op, (t.detach().requires_grad_(), weight.clone().requires_grad_(), bias, GROUPS, 1e-5)
        )
        _, mean, rstd = op(t, weight, bias, GROUPS, 1e-5)
        backward = torch.ops.pumice.group_norm_silu_backward.default
        for affine in (False, True):
            torch.library.opcheck(backward, (t, t, weight, bias, mean, rstd, GROUPS, affine))


@pytest.mark.real_empty
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(device: str, backend: str) -> None:
    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm_silu(x * 2, GROUPS, weight, bias).square().mean()

    x, weight, bias = inputs((2, 8, 6, 6), device)
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    eager = torch.autograd.grad(f(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, 3).long()}, TypeError, "^x is int64"),
        ({"x": torch.zeros(8)}, ValueError, "^x has shape"),
        ({"groups": 3}, ValueError, "^groups is 3; expected a divisor of the 8"),
        ({"groups": 0}, ValueError, "^groups is 0"),
        ({"weight": torch.zeros(7)}, ValueError, "^weight has shape"),
        ({"bias": None}, TypeError, "^bias must be a tensor"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "^bias is on meta"),
        ({"eps": -1.0}, ValueError, "^eps is -1.0"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 8, 3),
        "groups": 4,
        "weight": torch.ones(8),
        "bias": torch.ones(8),
    } | change
    with pytest.raises(error, match=message):
        ops.group_norm_silu(**arguments)
