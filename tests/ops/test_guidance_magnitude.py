from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opchecks import STORAGE, assert_magnitudes_close, layouts
from pumice import ops


def inputs(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    uncond = torch.randn(shape, generator=g)
    cond = uncond + 0.3 * torch.randn(shape, generator=g)
    return [cond.to(device, dtype), uncond.to(device, dtype)]


def check(cond: Tensor, uncond: Tensor) -> None:
    actual = ops.guidance_magnitude(cond, uncond)
    with ops.backend("torch"):
        plain = ops.guidance_magnitude(cond, uncond)
        exact = ops.guidance_magnitude(cond.double(), uncond.double())
    assert_magnitudes_close(actual, plain, exact, cond)


def test_reference_is_the_formula() -> None:
    cond, uncond = inputs((2, 4, 3, 5), "cpu")
    with ops.backend("torch"):
        m = ops.guidance_magnitude(cond, uncond)
    d = cond - uncond
    for i in range(2):
        torch.testing.assert_close(m.difference[i], d[i].norm())
        torch.testing.assert_close(m.unconditional[i], uncond[i].norm())
        torch.testing.assert_close(m.dot[i], (d[i] * uncond[i]).sum())
        cosines = [
            d[i, :, y, x].dot(uncond[i, :, y, x]) / (d[i, :, y, x].norm() * uncond[i, :, y, x].norm())
            for y in range(3)
            for x in range(5)
        ]
        torch.testing.assert_close(m.cosine[i], torch.stack(cosines).sum())


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 4, 33, 37), (2, 4, 64, 64), (2, 16, 5), (1, 3, 130, 130)], ids=str
)
def test_kernel(kernel: str, device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*inputs(shape, device, dtype))


def test_tails(kernel: str, device: str) -> None:
    for tail in range(17):
        check(*inputs((2, 4, 16 + tail), device))


def test_uncond_serves_the_batch(kernel: str, device: str) -> None:
    cond, uncond = inputs((3, 4, 8, 8), device)
    check(cond, uncond[:1])
    shared = ops.guidance_magnitude(cond, uncond[:1])
    for a, b in zip(shared, ops.guidance_magnitude(cond, uncond[:1].expand_as(cond)), strict=True):
        assert torch.equal(a, b)


def test_layouts(kernel: str, device: str) -> None:
    shape = (2, 4, 5, 7)
    cond, uncond = inputs(shape, device)
    g = torch.Generator().manual_seed(1)
    for _, other in layouts(lambda *s: torch.randn(s, generator=g).to(device), shape):
        check(other, uncond)
        check(cond, other)
        check(other, other * 0.5)


def test_many_channels_last(kernel: str, device: str) -> None:
    cond, uncond = (t.to(memory_format=torch.channels_last) for t in inputs((1, 1100, 2, 3), device))
    check(cond, uncond)
    check(cond[:, :700].contiguous(memory_format=torch.channels_last), uncond[:, :700])


def test_equal_predictions_and_zeros(kernel: str, device: str) -> None:
    cond, _ = inputs((2, 4, 6, 6), device)
    for a, b in ((cond, cond), (cond, cond * 0), (cond * 0, cond * 0)):
        check(a, b)
    assert ops.guidance_magnitude(cond, cond).difference.eq(0).all()


def test_empty(kernel: str, device: str) -> None:
    for shape in ((0, 4, 2, 2), (2, 4, 0)):
        result = ops.guidance_magnitude(torch.empty(shape, device=device), torch.empty(shape, device=device))
        assert result.difference.tolist() == [0.0] * shape[0]


def test_nan_stays_in_its_sample(kernel: str, device: str) -> None:
    cond, uncond = inputs((2, 4, 6, 6), device)
    cond[0, 1, 2, 3] = torch.nan
    check(cond, uncond)
    assert ops.guidance_magnitude(cond, uncond).difference.isnan().tolist() == [True, False]


def test_same_bits_for_any_batch(kernel: str, device: str) -> None:
    cond, uncond = inputs((5, 4, 65, 65), device)
    together = ops.guidance_magnitude(cond, uncond)
    alone = ops.guidance_magnitude(cond[3:4].clone(), uncond[3:4].clone())
    for a, b in zip(together, alone, strict=True):
        assert a[3] == b[0]


def test_gradcheck(device: str) -> None:
    cond, uncond = (t.double().requires_grad_() for t in inputs((2, 3, 2, 2), device))
    assert torch.autograd.gradcheck(lambda c, u: tuple(ops.guidance_magnitude(c, u)), (cond, uncond))
    assert torch.autograd.gradcheck(lambda c, u: tuple(ops.guidance_magnitude(c, u[:1])), (cond, uncond))


def test_opcheck(device: str) -> None:
    cond, uncond = inputs((2, 4, 5, 7), device)
    for pair in ((cond, uncond), (cond.half(), uncond[:1].half()), (cond.mT, uncond.mT)):
        torch.library.opcheck(torch.ops.pumice.guidance_magnitude.default, pair)


@pytest.mark.real_empty
def test_compiles(device: str) -> None:
    def f(cond: Tensor, uncond: Tensor) -> Tensor:
        return torch.stack(ops.guidance_magnitude(cond * 2, uncond[:1])).sum(0)

    tensors = inputs((2, 4, 8, 8), device)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(*tensors), f(*tensors))


@pytest.mark.parametrize(
    ("cond", "uncond", "error", "message"),
    [
        ([1.0], torch.zeros(2, 4, 3), TypeError, "^cond must be a tensor"),
        (torch.zeros(2, 4, 3).int(), torch.zeros(2, 4, 3), TypeError, "^cond is int32"),
        (torch.zeros(2, 4, 3), torch.zeros(2, 4, 3).half(), TypeError, "^uncond is float16"),
        (torch.zeros(4), torch.zeros(4), ValueError, "^cond has shape"),
        (torch.zeros(3, 4, 3), torch.zeros(2, 4, 3), ValueError, r"^uncond has shape \(2, 4, 3\)"),
        (torch.zeros(2, 4, 3), torch.zeros(2, 4), ValueError, "^uncond has shape"),
    ],
)
def test_bad_input(cond: Any, uncond: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.guidance_magnitude(cond, uncond)
