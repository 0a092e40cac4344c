from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opchecks import STORAGE, assert_kernel_close, layouts
from pumice import ops

NORMS = ("linf", "l2")
EPS = {"linf": 8 / 255, "l2": 0.5}


def inputs(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=g)
    x = x0 + 0.02 * torch.randn(shape, generator=g)
    grad = torch.randn(shape, generator=g)
    grad.view(-1)[::7] = 0
    return [x.to(device), grad.to(device, dtype), x0.to(device)]


def step(x: Tensor, grad: Tensor, x0: Tensor, norm: str = "linf", **kwargs: Any) -> Tensor:
    return ops.pgd_step(x, grad, x0, **{"step_size": 2 / 255, "eps": EPS[norm], "norm": norm, **kwargs})


def check(x: Tensor, grad: Tensor, x0: Tensor, norm: str, **kwargs: Any) -> None:
    """The chosen backend against plain torch and float64; linf agrees to the bit."""
    actual = step(x, grad, x0, norm, **kwargs)
    with ops.backend("torch"):
        plain = step(x, grad, x0, norm, **kwargs)
        exact = step(x.double(), grad.double(), x0.double(), norm, **kwargs)
    assert actual.dtype == x.dtype
    assert actual.stride() == plain.stride()
    if norm == "linf":
        torch.testing.assert_close(actual, plain, rtol=0, atol=0, equal_nan=True)
    assert_kernel_close(actual, plain, exact)


def test_reference_is_the_formula() -> None:
    x, grad, x0 = inputs((2, 3, 4, 5), "cpu")
    with ops.backend("torch"):
        linf, l2 = step(x, grad, x0), step(x, grad, x0, "l2")
    moved = x + 2 / 255 * grad.sign()
    torch.testing.assert_close(
        linf, torch.minimum(torch.maximum(moved, x0 - 8 / 255), x0 + 8 / 255).clamp(0, 1)
    )
    for i in range(2):
        delta = x[i] + 2 / 255 * grad[i] / grad[i].norm() - x0[i]
        delta = delta * min(1.0, 0.5 / delta.norm().item())
        torch.testing.assert_close(l2[i], (x0[i] + delta).clamp(0, 1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 3, 33, 37), (2, 3, 64, 64)], ids=str)
def test_kernel(kernel: str, device: str, shape: tuple[int, ...], dtype: torch.dtype, norm: str) -> None:
    check(*inputs(shape, device, dtype), norm)


@pytest.mark.parametrize("norm", NORMS)
def test_tails(kernel: str, device: str, norm: str) -> None:
    for tail in range(17):
        check(*inputs((2, 16 + tail), device), norm)


@pytest.mark.parametrize("norm", NORMS)
def test_more_than_one_chunk(kernel: str, device: str, norm: str) -> None:
    check(*inputs((2, 40_001), device), norm)


@pytest.mark.parametrize("norm", NORMS)
def test_layouts(kernel: str, device: str, norm: str) -> None:
    shape = (2, 3, 5, 7)
    x, grad, x0 = inputs(shape, device)
    g = torch.Generator().manual_seed(1)
    for _, other in layouts(lambda *s: torch.rand(s, generator=g).to(device), shape):
        check(other, grad, x0, norm)
        check(x, other, x0, norm)
        check(x, grad, other, norm)
        check(other, other, other, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_in_place(kernel: str, device: str, norm: str) -> None:
    shape = (2, 3, 5, 7)
    _, grad, x0 = inputs(shape, device)
    g = torch.Generator().manual_seed(1)
    for name, x in layouts(lambda *s: torch.rand(s, generator=g).to(device), shape):
        if "expanded" in name:
            with pytest.raises(ValueError, match=r"^x overlaps itself"):
                ops.pgd_step_(x, grad, x0, step_size=0.1, eps=0.2)
            continue
        expected = step(x, grad, x0, norm)
        version = x._version
        returned = ops.pgd_step_(x, grad, x0, step_size=2 / 255, eps=EPS[norm], norm=norm)
        assert returned is x
        assert x._version > version
        torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_step_size_per_sample(kernel: str, device: str, norm: str) -> None:
    x, grad, x0 = inputs((3, 2, 9), device)
    sizes = torch.tensor([0.01, -0.02, 0.0], device=device)
    check(x, grad, x0, norm, step_size=sizes)
    together = step(x, grad, x0, norm, step_size=sizes)
    for i, size in enumerate(sizes.tolist()):
        alone = step(x[i : i + 1], grad[i : i + 1], x0[i : i + 1], norm, step_size=size)
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("norm", NORMS)
def test_empty(kernel: str, device: str, norm: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 0)):
        x = torch.empty(shape, device=device)
        assert step(x, x, x, norm).shape == shape
        ops.pgd_step_(x, x, x, step_size=0.1, eps=0.1, norm=norm)


def test_sign_of_zero_is_zero(kernel: str, device: str) -> None:
    x0 = torch.full((1, 40), 0.5, device=device)
    grad = torch.zeros_like(x0)
    grad[:, 1::2] *= -1
    assert torch.equal(step(x0, grad, x0), x0)
    assert torch.equal(step(x0, grad, x0, "l2"), x0)


def test_nan(kernel: str, device: str) -> None:
    for position in range(3):
        for norm in NORMS:
            tensors = inputs((2, 40), device)
            tensors[position][0, 5] = torch.nan
            check(*tensors, norm)
    x, grad, x0 = inputs((2, 40), device)
    grad[0, 5] = torch.nan
    assert step(x, grad, x0)[0, 5] == x[0, 5].clamp(x0[0, 5] - EPS["linf"], x0[0, 5] + EPS["linf"]).clamp(
        0, 1
    )
    assert step(x, grad, x0, "l2").isnan().sum(1).tolist() == [40, 0]


def test_tiny_and_zero_gradients(kernel: str, device: str) -> None:
    x, grad, x0 = inputs((2, 50), device)
    for scale in (1e-10, 1e-30, 0.0):
        check(x, grad * scale, x0, "l2")


@pytest.mark.parametrize("norm", NORMS)
def test_never_leaves_the_budget(kernel: str, device: str, norm: str) -> None:
    x, _, x0 = inputs((2, 3, 8, 8), device)
    for i in range(20):
        x = step(x, inputs((2, 3, 8, 8), device, seed=i)[1], x0, norm, step_size=0.1, eps=0.125)
        delta = x - x0
        size = delta.abs().amax((1, 2, 3)) if norm == "linf" else delta.flatten(1).norm(dim=1)
        assert size.max() <= 0.125 + 1e-6
        assert 0 <= x.min()
        assert x.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_for_any_number_of_threads(norm: str) -> None:
    x, grad, x0 = inputs((3, 3, 128, 128), "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(step(x.repeat(4, 1, 1, 1), grad.repeat(4, 1, 1, 1), x0.repeat(4, 1, 1, 1), norm))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(device: str, norm: str) -> None:
    x, grad, x0 = inputs((2, 3, 5, 7), device)
    sizes = torch.tensor([0.1, 0.2], device=device)
    for a, b in ((x, grad.half()), (x.transpose(2, 3).contiguous().transpose(2, 3), grad)):
        for args in ((0.1, None), (0.0, sizes)):
            rest = (b, x0, *args, 0.3, 0.0, 1.0, norm)
            torch.library.opcheck(torch.ops.pumice.pgd_step.default, (a, *rest))
            torch.library.opcheck(torch.ops.pumice.pgd_step_.default, (a.clone(), *rest))


@pytest.mark.real_empty
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(device: str, backend: str) -> None:
    def loop(x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        x = step(x, grad * 2, x0) + 0
        return ops.pgd_step_(x, grad, x0, step_size=0.01, eps=0.5, norm="l2") * 1

    tensors = inputs((2, 3, 8, 8), device)
    compiled = torch.compile(loop, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*tensors), loop(*tensors))


def test_no_gradient_flows(device: str) -> None:
    x, grad, x0 = inputs((1, 8), device)
    assert not step(x.requires_grad_(), grad, x0).requires_grad
    with torch.no_grad():
        ops.pgd_step_(x, grad, x0, step_size=0.1, eps=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": 8.0}, ValueError, r"^eps is 8\.0.*\[0,1\] units, e\.g\. 8/255"),
        ({"eps": -0.1}, ValueError, "^eps is -0.1"),
        ({"eps": float("nan")}, ValueError, "^eps is nan"),
        ({"bounds": (1.0, 0.0)}, ValueError, "^bounds are"),
        ({"norm": "l1"}, ValueError, "^norm is 'l1'"),
        ({"step_size": float("inf")}, ValueError, "^step_size is inf"),
        ({"step_size": "big"}, TypeError, "^step_size must be a number"),
        ({"step_size": torch.ones(3)}, ValueError, r"^step_size has shape \(3,\)"),
        ({"x": torch.zeros(2, 4).half()}, TypeError, "^x is float16"),
        ({"x": [0.0]}, TypeError, "^x must be a tensor, not list"),
        ({"x": torch.zeros(())}, ValueError, "^grad has shape"),
        ({"grad": torch.zeros(2, 4).long()}, TypeError, "^grad is int64"),
        ({"grad": torch.zeros(2, 5)}, ValueError, r"^grad has shape \(2, 5\), x has \(2, 4\)"),
        ({"x0": torch.zeros(1, 4)}, ValueError, "^x0 has shape"),
        ({"x0": torch.zeros(2, 4).double()}, TypeError, "^x0 is float64"),
        ({"x0": torch.zeros(2, 4, device="meta")}, ValueError, "^x0 is on meta"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = (
        {name: torch.zeros(2, 4) for name in ("x", "grad", "x0")} | {"step_size": 0.1, "eps": 0.1} | change
    )
    for function in (ops.pgd_step, ops.pgd_step_):
        with pytest.raises(error, match=message) as raised:
            function(arguments["x"], arguments["grad"], arguments["x0"], **dict(list(arguments.items())[3:]))
        assert "\n" not in str(raised.value)
