"""Triton kernel of `pumice.ops.low_rank_edit_`: one launch a matrix, since a table of pointers would have to
be copied to the device first."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _edit_kernel(
    weight_ptr, up_ptr, down_ptr,
    rows, columns, rank, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """W += sum over k of (W . up[k]) down[k], for whole rows; up and down are (rank, columns)"""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLUMNS)[None, :]
    to = weight_ptr + i * stride + j
    inside = (i < rows) & (j < columns)
    weight = tl.load(to, mask=inside, other=0.0).to(tl.float32)
    delta = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(rank):
        up = tl.load(up_ptr + k * columns + j, mask=j < columns, other=0.0)
        down = tl.load(down_ptr + k * columns + j, mask=j < columns, other=0.0)
        delta += tl.sum(weight * up, axis=1)[:, None] * down
    tl.store(to, (weight + delta).to(weight_ptr.dtype.element_ty), mask=inside)


def low_rank_edit(weights: list[Tensor], up: Tensor, down: Tensor, elements: int = 8192) -> None:
    """Edit the weights by up, D transposed, and down, both (rank, columns); `elements` go to a program."""
    rank, columns = down.shape
    width = triton.next_power_of_2(columns)
    block = max(1, elements // width)
    for weight in weights:
        rows = weight.shape[0]
        _edit_kernel[(triton.cdiv(rows, block),)](
            weight, up, down, rows, columns, rank, weight.stride(0),
            ROWS=block, COLUMNS=width, num_warps=8,
        )  # fmt: skip
