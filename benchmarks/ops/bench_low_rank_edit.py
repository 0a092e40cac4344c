from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from harness import Case, benchmark_of, main
from pumice import ops
from pumice.ops.low_rank_edit import KERNEL_RANKS

# The width of the key and value projections of cross-attention, and the rows of each.
MODELS = {
    "sd1.5": (768, 10 * [320] + 10 * [640] + 12 * [1280]),
    "sdxl": (2048, 20 * [640] + 120 * [1280]),
}


def eager(weights: list[Tensor], up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    for weight in weights:
        weight.add_((weight @ up) @ down)
    return tuple(weights)


def ours(weights: list[Tensor], up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    ops.low_rank_edit_(weights, up, down)
    return tuple(weights)


def cases(device: str) -> Iterator[Case]:
    ranks, dtypes = (1, 4, 16, KERNEL_RANKS), (torch.float32, torch.bfloat16)
    settings = [("sd1.5", rank, dtype) for dtype in dtypes for rank in ranks]
    if device == "cuda":
        settings += [("sdxl", rank, dtype) for dtype in dtypes for rank in ranks]
    else:
        settings += [("sdxl", 4, torch.float32)]
    for model, rank, dtype in settings:
        d, rows = MODELS[model]
        weights = [torch.randn(o, d, device=device).to(dtype) for o in rows]
        # A projection: however often a benchmark applies it, the result is the same.
        up = torch.linalg.qr(torch.randn(d, rank, device=device)).Q
        down = -up.t().contiguous()
        yield Case(
            "low_rank_edit_",
            f"{model} rank {rank} {str(dtype)[6:]}",
            2 * sum(weight.nbytes for weight in weights),
            partial(eager, [weight.clone() for weight in weights], up.to(dtype), down.to(dtype)),
            partial(ours, weights, up, down),
            1e-4 if dtype == torch.float32 else 3e-2,
        )


test_low_rank_edit = benchmark_of(cases)

if __name__ == "__main__":
    main(cases)
