from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from opchecks import STORAGE, assert_kernel_close
from pumice import ops

Given = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def kernel() -> Iterator[str]:
    """The one backend beside the reference."""
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        pytest.skip("no triton, or kernels are compiled for the GPU, see tests/gpu")
    with ops.backend("triton"):
        yield "triton"


def inputs(
    batch: int = 2,
    heads: int = 3,
    queries: int = 37,
    keys: int = 33,
    dim: int = 20,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    share: float = 0.2,
) -> Given:
    g = torch.Generator().manual_seed(queries * keys + dim)
    q = torch.randn(batch, heads, queries, dim, generator=g).to(device, dtype)
    k = torch.randn(batch, heads, keys, dim, generator=g).to(device, dtype)
    columns = torch.rand(batch, keys, generator=g) < share
    columns[:, -1:] = True  # the root of nothing has no gradient
    return q, k, columns.to(device)


def exact(q: Tensor, k: Tensor, columns: Tensor, scale: float | None = None) -> Tensor:
    """By the definition, through the whole map; in float64, of either kind."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = (q.double() @ k.double().mT * scale).softmax(-1)
    return torch.stack([p[b][:, :, columns[b]].square().sum(-1) for b in range(len(p))])


def with_gradients(f: Any, q: Tensor, k: Tensor, columns: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of a norm of it."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = f(q, k, columns)
    weight = torch.linspace(0.5, 2, out.shape[2], dtype=out.dtype, device=out.device)
    return [out.detach(), *torch.autograd.grad((weight * out).sum().sqrt(), (q, k))]


def check(q: Tensor, k: Tensor, columns: Tensor) -> None:
    actual = with_gradients(ops.attention_columns, q, k, columns)
    with ops.backend("torch"):
        plain = with_gradients(ops.attention_columns, q, k, columns)
    wide = with_gradients(exact, q.double(), k.double(), columns)
    for a, p, e, like in zip(actual, plain, wide, (None, q, k), strict=True):
        assert a.dtype == p.dtype == (torch.float32 if like is None else like.dtype)
        assert_kernel_close(a, p, e)


def test_reference_is_the_definition() -> None:
    given = [x.double() if x.is_floating_point() else x for x in inputs()]
    for a, e in zip(
        with_gradients(ops.attention_columns, *given), with_gradients(exact, *given), strict=True
    ):
        torch.testing.assert_close(a, e, atol=1e-13, rtol=1e-10)
    q, k, columns = given
    found = ops.attention_columns(q, k, columns, 0.7)
    torch.testing.assert_close(found, exact(q, k, columns, 0.7))


def test_gradcheck() -> None:
    q, k, columns = inputs(queries=5, keys=7, dim=4)
    q, k = q.double().requires_grad_(), k.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: ops.attention_columns(q, k, columns), (q, k))


@pytest.mark.parametrize("masked", [False, True])
def test_norms_against_finite_differences(masked: bool) -> None:
    """One norm over all layers, and the sum of a norm for each, inside a mask of queries or everywhere."""
    layers = [inputs(1, 2, 9, 6, 4), inputs(1, 2, 4, 6, 3)]
    layers = [(q.double(), k.double(), columns) for q, k, columns in layers]
    masks = [(torch.arange(q.shape[2]) % 3 > 0) | (not masked) for q, *_ in layers]
    for outer in (
        lambda found: sum(each.sum() for each in found).sqrt(),
        lambda found: sum(each.sum().sqrt() for each in found),
    ):

        def loss(number: int, q: Tensor, outer: Any = outer) -> Tensor:
            given = [(q, *rest) if at == number else (own, *rest) for at, (own, *rest) in enumerate(layers)]
            return outer(
                [ops.attention_columns(*each) * mask for each, mask in zip(given, masks, strict=True)]
            )

        for number, (q, *_) in enumerate(layers):
            q = q.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(number, q), q)
            step, direction = 1e-5, torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).double()
            change = loss(number, q + step * direction) - loss(number, q - step * direction)
            torch.testing.assert_close(
                change.detach() / (2 * step), (gradient * direction).sum(), rtol=1e-6, atol=1e-9
            )
            outside = gradient[:, :, ~masks[number]]
            assert torch.equal(outside, torch.zeros_like(outside))


def test_norm_of_all_layers_and_sum_of_norms() -> None:
    """What both losses are, from the maps themselves."""
    layers = [inputs(1, 2, 9, 6, 4), inputs(1, 2, 4, 6, 3)]
    maps = [(q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[..., columns[0]] for q, k, columns in layers]
    squares = [ops.attention_columns(*each).sum() for each in layers]
    whole = torch.cat([each.flatten() for each in maps]).norm()
    torch.testing.assert_close(sum(squares).sqrt(), whole)
    torch.testing.assert_close(sum(each.sqrt() for each in squares), sum(each.norm() for each in maps))


def test_all_columns_and_none() -> None:
    q, k, _ = inputs()
    every, none = (torch.full((2, 33), fill) for fill in (True, False))
    p = (q @ k.mT * 20**-0.5).softmax(-1)
    torch.testing.assert_close(ops.attention_columns(q, k, every), p.square().sum(-1))
    assert torch.equal(ops.attention_columns(q, k, none), torch.zeros(2, 3, 37))


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_kernel(kernel: str, device: str, dtype: torch.dtype) -> None:
    check(*inputs(dtype=dtype, device=device))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (1, 2, 130, 77, 40), (2, 1, 64, 128, 16), (1, 2, 65, 3, 5)], ids=str
)
def test_kernel_of_any_size(kernel: str, device: str, shape: tuple[int, int, int, int, int]) -> None:
    check(*inputs(*shape, device=device))


def test_more_keys_than_a_tile_has(kernel: str, device: str) -> None:
    check(*inputs(1, 1, 5, 140, 8, device=device))
    check(*inputs(1, 1, 5, 8, 270, device=device))


def test_layouts(kernel: str, device: str) -> None:
    q, k, columns = inputs(device=device)
    for strided in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # as attention has them
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack((x, x), -1)[..., 0],
        lambda x: x[:1].expand(2, -1, -1, -1),
    ):
        check(strided(q), strided(k), columns)
    check(q, k, torch.stack((columns, ~columns), -1)[..., 0])


def test_empty(kernel: str, device: str) -> None:
    for shape in ((0, 2, 4, 5, 3), (2, 2, 0, 5, 3)):
        q, k, columns = inputs(*shape, device=device)
        found = with_gradients(ops.attention_columns, q, k, columns)
        assert found[0].shape == q.shape[:3]
        assert torch.equal(found[2], torch.zeros_like(k))


def test_nan_and_large_scores(kernel: str, device: str) -> None:
    q, k, columns = inputs(device=device)
    check(30 * q, 30 * k, columns)
    q[0, 1, 5, 2] = torch.nan
    at = ops.attention_columns(q, k, columns).isnan().nonzero().tolist()
    assert at == [[0, 1, 5]]


def test_same_bits_every_time(kernel: str, device: str) -> None:
    given = inputs(queries=150, device=device)
    first, again = (with_gradients(ops.attention_columns, *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nothing_of_the_size_of_the_map_is_kept() -> None:
    q, k, columns = inputs(1, 2, 64, 33, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.attention_columns(q.requires_grad_(), k.requires_grad_(), columns)
    assert max(x.numel() for x in kept) == q.numel() < 2 * 64 * 33


def test_opcheck() -> None:
    q, k, columns = inputs(1, 2, 5, 4, 3)
    counts = columns.float()
    op = torch.ops.pumice.attention_columns.default
    torch.library.opcheck(op, (q.requires_grad_(), k.requires_grad_(), counts, 0.5))
    torch.library.opcheck(op, (q.detach().half().mT.contiguous().mT, k.detach().half(), counts, 0.5))
    backward = torch.ops.pumice.attention_columns_backward.default
    given = torch.rand(1, 2, 5), q.detach(), k.detach(), counts, torch.rand(1, 2, 5), 0.5
    torch.library.opcheck(backward, given)


@pytest.mark.real_empty
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(backend: str) -> None:
    q, k, columns = inputs(1, 2, 5, 4, 3)

    def f(q: Tensor, k: Tensor) -> Tensor:
        return ops.attention_columns(q * 2, k, columns).sum().sqrt()

    q.requires_grad_()
    expected, actual = (each(q, k) for each in (f, torch.compile(f, fullgraph=True, backend=backend)))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, q)[0] for each in (actual, expected)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1, 2, 5, 3).long()}, TypeError, "^q is int64"),
        ({"q": torch.zeros(2, 5, 3)}, ValueError, r"^q: got shape \(2, 5, 3\), expected four"),
        ({"k": torch.zeros(1, 2, 4, 3).half()}, TypeError, "^k: got torch.float16, expected torch.float32"),
        ({"k": torch.zeros(1, 2, 4, 6)}, ValueError, r"^k: got shape .*expected \(1, 2, M, 3\)"),
        ({"k": torch.zeros(1, 2, 0, 3)}, ValueError, "^k: got shape .*at least one key"),
        ({"columns": torch.zeros(1, 4)}, TypeError, "^columns: got torch.float32, expected a bool tensor"),
        ({"columns": [True]}, TypeError, "^columns: got list"),
        ({"columns": torch.ones(4).bool()}, ValueError, r"^columns: got shape \(4,\), expected \(1, 4\)"),
        ({"scale": torch.inf}, ValueError, "^scale is inf"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "q": torch.zeros(1, 2, 5, 3),
        "k": torch.zeros(1, 2, 4, 3),
        "columns": torch.ones(1, 4).bool(),
    } | change
    with pytest.raises(error, match=message):
        ops.attention_columns(**given)


def test_there_is_no_kernel_of_c() -> None:
    with ops.backend("cpu"), pytest.raises(ops.BackendError):
        ops.attention_columns(*inputs())
