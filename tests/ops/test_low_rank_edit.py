from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from opchecks import HALF, STORAGE, assert_kernel_close
from pumice import ops
from pumice.ops import low_rank_edit

ROWS = (320, 1, 0, 13, 64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(device: str, d: int, rank: int) -> tuple[Tensor, Tensor]:
    return normal(d, rank, seed=1).to(device) / d**0.5, normal(rank, d, seed=2).to(device) / max(rank, 1)


def inputs(
    device: str, d: int, rank: int, dtype: torch.dtype = torch.float32, rows: Sequence[int] = ROWS
) -> tuple[list[Tensor], Tensor, Tensor]:
    return [normal(o, d, seed=o).to(device, dtype) for o in rows], *factors(device, d, rank)


def exactly(weights: Sequence[Tensor], up: Tensor, down: Tensor) -> list[Tensor]:
    return [w.double() + (w.double() @ up.double()) @ down.double() for w in weights]


def check(weights: Sequence[Tensor], up: Tensor, down: Tensor) -> None:
    """The chosen backend against plain torch and float64, in place; the weights are changed."""
    plain, exact = [weight.clone() for weight in weights], exactly(weights, up, down)
    with ops.backend("torch"):
        ops.low_rank_edit_(plain, up, down)
    ops.low_rank_edit_(weights, up, down)
    for weight, p, e in zip(weights, plain, exact, strict=True):
        assert_kernel_close(weight, p, e)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_reference_is_the_formula(dtype: torch.dtype) -> None:
    weights, up, down = inputs("cpu", 48, 3, dtype)
    exact = exactly(weights, up, down)
    with ops.backend("torch"):
        ops.low_rank_edit_(weights, up, down)
    for weight, e in zip(weights, exact, strict=True):
        assert weight.dtype == dtype
        torch.testing.assert_close(weight, e.to(dtype))


def test_float64_is_exact() -> None:
    weights, up, down = (
        [normal(5, 7).double()],
        normal(7, 2, seed=1).double(),
        normal(2, 7, seed=2).double(),
    )
    expected = weights[0] @ (torch.eye(7, dtype=torch.float64) + up @ down)
    ops.low_rank_edit_(weights, up, down)
    torch.testing.assert_close(weights[0], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("d", [64, 768])
def test_kernel(kernel: str, device: str, d: int, rank: int, dtype: torch.dtype) -> None:
    check(*inputs(device, d, rank, dtype))


def test_tails(kernel: str, device: str) -> None:
    for d in (*range(1, 36), 2049):
        for dtype in STORAGE:
            check(*inputs(device, d, 3, dtype, (1, 9)))


@pytest.mark.parametrize("rank", [*range(1, 10), 31, low_rank_edit.KERNEL_RANKS])
def test_ranks(kernel: str, device: str, rank: int) -> None:
    check(*inputs(device, 40, rank, rows=range(1, 18)))


def test_a_kernel_takes_any_rank(kernel: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank_edit, "KERNEL_RANKS", 10**6)
    check(*inputs(device, 24, 301, rows=(9,)))


def test_a_large_rank_is_the_reference(kernel: str, device: str) -> None:
    weights, up, down = inputs(device, 24, low_rank_edit.KERNEL_RANKS + 1, torch.bfloat16)
    expected = [weight.clone() for weight in weights]
    low_rank_edit.reference(expected, up, down)
    ops.low_rank_edit_(weights, up, down)
    for weight, e in zip(weights, expected, strict=True):
        assert torch.equal(weight, e)


def test_more_matrices_than_a_launch_takes(kernel: str, device: str) -> None:
    check(*inputs(device, 16, 2, rows=[1 + i % 40 for i in range(301)]))


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_layouts(kernel: str, device: str, dtype: torch.dtype) -> None:
    o, d = 11, 32
    whole = normal(o, 2 * d + 1).to(device, dtype)
    for name, weight in {
        "left columns": whole[:, :d],
        "right columns": whole[:, d : 2 * d],
        "unaligned columns": whole[:, d + 1 :],
        "every second row": normal(2 * o, d).to(device, dtype)[::2],
        "every second column": normal(o, 2 * d).to(device, dtype)[:, ::2],
        "transposed": normal(d, o).to(device, dtype).t(),
        "a single row": whole[3:4, 1 : d + 1],
    }.items():
        version = weight._version
        check([weight], *factors(device, d, 2))
        assert weight._version > version, name


def test_what_lies_beside_a_slice_stays(kernel: str, device: str) -> None:
    whole = normal(11, 64).to(device)
    left, right = whole[:, :32].clone(), whole[:, 32:].clone()
    check([whole[:, 32:]], *factors(device, 32, 2))
    assert torch.equal(whole[:, :32], left)
    assert not torch.equal(whole[:, 32:], right)
    check([whole[:, :32], whole[:, 32:]], *factors(device, 32, 2))  # two slices of one matrix are two weights


def test_large_matrix(kernel: str, device: str) -> None:
    if kernel == "triton" and device == "cpu":
        pytest.skip("slow when interpreted")
    check(*inputs(device, 2048, 5, torch.float16, (640, 1280)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_is_rounded_once(kernel: str, device: str, dtype: torch.dtype) -> None:
    """Many ranks, each far too small to change a half weight alone, change it together."""
    rank = 32
    weights = [torch.ones(4, 64, device=device, dtype=dtype)]
    up = torch.full((64, rank), 1 / 64, device=device)
    down = torch.full((rank, 64), torch.finfo(dtype).eps / rank, device=device)
    ops.low_rank_edit_(weights, up, down)
    assert torch.equal(weights[0], torch.full_like(weights[0], 1 + torch.finfo(dtype).eps))


def test_rank_zero_and_nothing(kernel: str, device: str) -> None:
    for dtype in STORAGE:
        weights, up, down = inputs(device, 16, 0, dtype)
        weights[0][0, :3] = torch.tensor([torch.nan, -0.0, torch.inf])
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        before = [weight.view(bits).clone() for weight in weights]
        ops.low_rank_edit_(weights, up, down)
        assert all(torch.equal(weight.view(bits), b) for weight, b in zip(weights, before, strict=True))
    ops.low_rank_edit_([], *factors(device, 16, 2))
    empty = torch.empty(0, 16, device=device)
    ops.low_rank_edit_([empty, empty], *factors(device, 16, 2))
    ops.low_rank_edit_([torch.empty(3, 0, device=device)], *factors(device, 0, 2))


def test_nan_and_infinity(kernel: str, device: str) -> None:
    for value in (torch.nan, torch.inf):
        for position in range(3):
            weights, up, down = inputs(device, 21, 5)
            (weights[0], up, down)[position][2, 3] = value
            up[7, :] = 0
            check(weights, up, down)
    weights, up, down = inputs(device, 21, 5)
    weights[0][2, 3] = torch.inf
    up[3, :] = 0  # 0 * inf: the whole row is NaN, and no other
    ops.low_rank_edit_(weights, up, down)
    assert weights[0].isnan().all(1).nonzero().flatten().tolist() == [2]
    assert weights[0].isnan().any(1).sum() == 1


def test_parameters(kernel: str, device: str) -> None:
    weights, up, down = inputs(device, 16, 2)
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    versions = [parameter._version for parameter in parameters]
    ops.low_rank_edit_(parameters, up.requires_grad_(), down.requires_grad_())
    ops.low_rank_edit_(weights, up, down)
    for parameter, weight, version in zip(parameters, weights, versions, strict=True):
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert parameter._version > version or not parameter.numel()
        assert torch.equal(parameter, weight)


def test_autograd_sees_the_write(kernel: str, device: str) -> None:
    weights, up, down = inputs(device, 16, 2)
    loss = (weights[0].requires_grad_() ** 2).sum()
    ops.low_rank_edit_(weights, up, down)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_inference_mode(kernel: str, device: str) -> None:
    weights, up, down = inputs(device, 16, 2)
    with torch.inference_mode():
        check([weight.clone() for weight in weights], up, down)
        check(weights, up, down)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    weights, up, down = inputs("cpu", 768, 16, dtype, (3203, 5, 640))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5, 64):
            torch.set_num_threads(count)
            results.append([weight.clone() for weight in weights])
            ops.low_rank_edit_(results[-1], up, down)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_same_bits_alone_and_together(kernel: str, device: str) -> None:
    weights, up, down = inputs(device, 48, 6)
    alone = [weight.clone() for weight in weights]
    ops.low_rank_edit_(weights, up, down)
    for weight, together in zip(alone, weights, strict=True):
        ops.low_rank_edit_([weight], up, down)
        assert torch.equal(weight, together)


def test_opcheck(device: str) -> None:
    for dtype in STORAGE:
        arguments = inputs(device, 8, 2, dtype, (4, 3))
        torch.library.opcheck(torch.ops.pumice.low_rank_edit_.default, arguments)
    whole = normal(4, 16).to(device)
    arguments = [whole[:, :8], whole[:, 8:]], *factors(device, 8, 2)
    torch.library.opcheck(torch.ops.pumice.low_rank_edit_.default, arguments)


@pytest.mark.real_empty
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(device: str, backend: str) -> None:
    def edited(weight: Tensor, other: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weight = weight * 2
        ops.low_rank_edit_([weight, other], up, down)
        return weight @ other.t()

    (weight, other), up, down = inputs(device, 8, 2, rows=(4, 3))
    expected = [weight.clone(), other.clone()]
    result = torch.compile(edited, fullgraph=True, backend=backend)(weight, other, up, down)
    torch.testing.assert_close(result, edited(*expected, up, down))
    torch.testing.assert_close([weight, other], expected)


W = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": W}, TypeError, "^weights must be a sequence of tensors, not Tensor"),
        ({"weights": {W}}, TypeError, "^weights must be a sequence of tensors, not set"),
        ({"weights": [W, 1.0]}, TypeError, r"^weights\[1\] must be a tensor, not float"),
        ({"weights": [W.long()]}, TypeError, r"^weights\[0\] is int64"),
        ({"weights": [W, W.half()]}, TypeError, r"^weights\[1\] is float16, weights\[0\] is float32"),
        ({"weights": [W[0]]}, ValueError, r"^weights\[0\] has shape \(4,\)"),
        ({"weights": [W, W.t()]}, ValueError, r"^weights\[1\] has shape \(4, 3\)"),
        ({"weights": [W, W.to("meta")]}, ValueError, r"^weights\[1\] is on meta"),
        ({"weights": [W[:1].expand(3, 4)]}, ValueError, r"^weights\[0\] overlaps itself"),
        ({"weights": [W.as_strided((3, 4), (2, 1))]}, ValueError, r"^weights\[0\] overlaps itself"),
        ({"weights": [W, W]}, ValueError, "^weights share memory"),
        ({"up": None}, TypeError, "^up must be a tensor, not NoneType"),
        ({"up": torch.zeros(4, 2).half()}, TypeError, "^up is float16; expected float32"),
        ({"weights": [W.double()]}, TypeError, "^up is float32; expected float64"),
        ({"up": torch.zeros(3, 2)}, ValueError, r"^up has shape \(3, 2\)"),
        ({"up": torch.zeros(4)}, ValueError, r"^up has shape \(4,\)"),
        ({"up": torch.zeros(4, 2, device="meta")}, ValueError, "^up is on meta"),
        ({"down": torch.zeros(2, 4).double()}, TypeError, "^down is float64"),
        ({"down": torch.zeros(4, 2)}, ValueError, r"^down has shape \(4, 2\); expected \(2, 4\)"),
        ({"down": torch.zeros(3, 4)}, ValueError, r"^down has shape \(3, 4\); expected \(2, 4\)"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"weights": [W], "up": torch.zeros(4, 2), "down": torch.zeros(2, 4)} | change
    with pytest.raises(error, match=message) as raised:
        ops.low_rank_edit_(**arguments)
    assert "\n" not in str(raised.value)
