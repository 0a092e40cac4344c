from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from opchecks import STORAGE, assert_kernel_close, layouts
from pumice import ops
from pumice.ops.separable_sum import _taps

Taps = tuple[Tensor, Tensor]


@pytest.fixture(params=["cpu-default", "cpu-avx2", "cpu-avx512"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backends that the op has: C++, at each instruction level that this processor has."""
    from pumice import _native

    level = request.param.partition("-")[2]
    if _native.CPU_LEVELS.index(level) > _native.extension("_cpu").best_isa():
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv("PUMICE_CPU_ISA", level)
    with ops.backend("cpu"):
        yield "cpu"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def taps(count: int, terms: int, side: int, seed: int = 0) -> Taps:
    """Any places in any order, some of them twice; weights of both signs, some of them 0."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, terms, generator=g, dtype=torch.float64)
    weights[torch.rand(count, terms, generator=g) < 0.2] = 0
    return torch.randint(side, (count, terms), generator=g), weights


def matrix(taps: Taps, side: int) -> Tensor:
    """(count, side), by the definition."""
    found = torch.zeros(len(taps[0]), side, dtype=torch.float64)
    for i, (places, weights) in enumerate(zip(*taps, strict=True)):
        for place, weight in zip(places.tolist(), weights, strict=True):
            found[i, place] += weight
    return found


def check(images: Tensor, rows: Taps, columns: Taps) -> None:
    actual = ops.separable_sum(images, *rows, *columns)
    with ops.backend("torch"):
        plain = ops.separable_sum(images, *rows, *columns)
    left, right = (matrix(*each) for each in ((rows, images.shape[2]), (columns, images.shape[3])))
    # The op's weights are float32 ones.
    exact = left.float().double() @ images.double() @ right.float().double().t()
    assert actual.dtype == plain.dtype == images.dtype and actual.is_contiguous()
    scale = (left.abs() @ images.double().abs() @ right.abs().t()).max().item()
    assert_kernel_close(actual, plain, exact, scale=max(1.0, scale))


def test_reference_is_the_definition() -> None:
    rows, columns = taps(5, 3, 9), taps(11, 4, 7, seed=1)
    x = noise(2, 3, 9, 7).double()
    expected = matrix(rows, 9) @ x @ matrix(columns, 7).t()
    torch.testing.assert_close(ops.separable_sum(x, *rows, *columns), expected)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (33, 37), (150, 21), (64, 130)], ids=str)
def test_kernel(kernel: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    height, width = size
    images = noise(2, 3, height, width).to(dtype)
    check(images, taps(height, 3, height), taps(width, 5, width, seed=1))
    check(images, taps(70, 4, height), taps(5, 2, width, seed=1))  # of another size


def test_tails(kernel: str) -> None:
    for side in (*range(1, 19), 31, 32, 33, 63, 64, 65, 81):
        images = noise(1, 1, 5, side)
        check(images, taps(3, 2, 5), taps(side, 3, side))
        check(images.mT, taps(side, 3, side), taps(3, 2, 5))


def test_copies_are_exact(kernel: str) -> None:
    x = noise(1, 2, 40, 50)
    same = [(torch.arange(side)[:, None], torch.ones(side, 1)) for side in (40, 50)]
    assert torch.equal(ops.separable_sum(x, *same[0], *same[1]), x)
    turned = [(places.flip(0), weights) for places, weights in same]
    assert torch.equal(ops.separable_sum(x, *turned[0], *turned[1]), x.flip(2, 3))


def test_layouts(kernel: str) -> None:
    for _, images in layouts(noise, (2, 3, 5, 7)):
        check(images, taps(4, 3, 5), taps(6, 3, 7))


def test_empty(kernel: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4)):
        found = ops.separable_sum(torch.empty(shape), *taps(5, 2, 4), *taps(6, 2, 4))
        assert found.shape == (*shape[:2], 5, 6)
    nothing = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    assert ops.separable_sum(noise(1, 1, 4, 4), *nothing, *taps(6, 2, 4)).shape == (1, 1, 0, 6)


def test_nan_stays_in_what_is_summed_from_it(kernel: str) -> None:
    x = noise(1, 2, 20, 24)
    x[0, 1, 3, 5] = torch.nan
    places = torch.arange(20)[:, None], torch.ones(20, 1)
    across = torch.tensor([[5, 6], [6, 7]]), torch.ones(2, 2)
    found = ops.separable_sum(x, *places, *across).isnan().nonzero().tolist()
    assert found == [[0, 1, 3, 0]]


def test_same_bits_for_any_number_of_threads() -> None:
    images, rows, columns = noise(3, 3, 200, 130), taps(190, 9, 200), taps(130, 9, 130)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.separable_sum(images, *rows, *columns))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_plane_alone_is_what_it_is_in_a_batch(kernel: str) -> None:
    images, rows, columns = noise(3, 2, 30, 41), taps(70, 5, 30), taps(22, 5, 41)
    together = ops.separable_sum(images, *rows, *columns)
    assert torch.equal(together[2:, :1], ops.separable_sum(images[2:, :1], *rows, *columns))


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_gradient_is_the_transposed_sum(kernel: str, dtype: torch.dtype) -> None:
    rows, columns = taps(17, 6, 9), taps(20, 3, 31, seed=1)
    images = noise(2, 2, 9, 31).to(dtype).requires_grad_()
    back = noise(2, 2, 17, 20, seed=1).to(dtype)
    (actual,) = torch.autograd.grad(ops.separable_sum(images, *rows, *columns), images, back)
    with ops.backend("torch"):
        (plain,) = torch.autograd.grad(ops.separable_sum(images, *rows, *columns), images, back)
    left, right = matrix(rows, 9), matrix(columns, 31)
    exact = left.t().float().double() @ back.double() @ right.float().double()
    scale = (left.t().abs() @ back.double().abs() @ right.abs()).max().item()
    assert_kernel_close(actual, plain, exact, scale=scale)


def test_gradients_of_gradients() -> None:
    rows, columns = taps(4, 3, 5), taps(6, 2, 3, seed=1)

    def f(x: Tensor) -> Tensor:
        return ops.separable_sum(x, *rows, *columns)

    x = noise(1, 2, 5, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_weights_of_nothing_have_a_gradient_of_zero(kernel: str) -> None:
    none = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)
    x = noise(1, 1, 4, 4).requires_grad_()
    ops.separable_sum(x, *none, *none).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_opcheck() -> None:
    images = noise(2, 3, 5, 7).requires_grad_()
    tables = _taps("row", *taps(4, 3, 5), 5, images), _taps("column", *taps(6, 2, 7), 7, images)
    torch.library.opcheck(torch.ops.pumice.separable_sum.default, (images, *tables))
    strided = noise(2, 3, 5, 14).half()[..., ::2]
    torch.library.opcheck(torch.ops.pumice.separable_sum.default, (strided, *tables))
    back = noise(2, 3, 4, 6).requires_grad_()
    torch.library.opcheck(torch.ops.pumice.separable_sum_backward.default, (back, *tables, 5, 7))


@pytest.mark.real_empty
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(backend: str) -> None:
    rows, columns = taps(4, 3, 8), taps(6, 2, 8)

    def f(images: Tensor) -> Tensor:
        return ops.separable_sum(images * 0.5, *rows, *columns) + 1

    images = noise(1, 3, 8, 8)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend=backend)(images), f(images))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 5).long()}, TypeError, "^images is int64"),
        ({"images": torch.zeros(3, 4, 5)}, ValueError, r"^images: got shape \(3, 4, 5\), expected"),
        (
            {"row_places": torch.zeros(6, 2)},
            TypeError,
            "^row_places: got torch.float32, expected",
        ),
        ({"row_places": [0]}, TypeError, "^row_places: got a list, expected a tensor"),
        ({"row_places": torch.full((6, 2), 4)}, ValueError, "^row_places: got 4 to 4, expected 0 to 3"),
        ({"column_places": torch.full((6, 2), -1)}, ValueError, "^column_places: got -1 to -1"),
        ({"column_weights": torch.zeros(6, 2).long()}, TypeError, "^column_weights: got torch.int64"),
        ({"column_weights": torch.zeros(6, 3)}, ValueError, r"^column_places, column_weights: got shapes"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    places, weights = torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 2)
    arguments = {
        "images": torch.zeros(2, 3, 4, 5),
        "row_places": places,
        "row_weights": weights,
        "column_places": places,
        "column_weights": weights,
    } | change
    with pytest.raises(error, match=message):
        ops.separable_sum(**arguments)


def test_there_is_no_kernel_but_of_c() -> None:
    with ops.backend("triton"), pytest.raises(ops.BackendError):
        ops.separable_sum(noise(1, 1, 4, 4), *taps(4, 1, 4), *taps(4, 1, 4))
