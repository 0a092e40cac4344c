from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from harness import Case, benchmark_of, main
from pumice import ops


def cases(device: str) -> Iterator[Case]:
    """A norm of columns of the attention of layers of Stable Diffusion 1.5 and XL, and its gradient."""
    for name, heads, queries, dim in (
        ("SD 1.5, 64x64", 8, 4096, 40),
        ("SD 1.5, 16x16", 8, 256, 160),
        ("SD XL, 64x64", 10, 4096, 64),
    ):
        q = torch.randn(1, heads, queries, dim, device=device).requires_grad_()
        k = torch.randn(1, heads, 77, dim, device=device).requires_grad_()
        columns = torch.zeros(1, 77, dtype=torch.bool, device=device)
        columns[:, 4:8] = True
        yield Case(
            "attention_columns",
            f"{name}, forward and backward",
            3 * (q.nbytes + k.nbytes),  # read twice, and the gradients written
            partial(_gradients, _through_the_map, q, k, columns),
            partial(_gradients, ops.attention_columns, q, k, columns),
        )


def _gradients(f: Callable[..., Tensor], q: Tensor, k: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        return torch.autograd.grad(f(q, k, columns).sum().sqrt(), (q, k))


def _through_the_map(q: Tensor, k: Tensor, columns: Tensor) -> Tensor:
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (p.square() * columns[:, None, None]).sum(-1)


test_attention_columns = benchmark_of(cases)

if __name__ == "__main__":
    main(cases)
