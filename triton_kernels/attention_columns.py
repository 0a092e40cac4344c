"""Triton kernels of `pumice.ops.attention_columns`; arguments and meaning as in its references.

A program takes a block of one head's queries and all of its keys, which fit one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tile(
    q_ptr, k_ptr, columns_ptr, heads, queries, keys, dim,
    q_batch, q_head, q_row, k_batch, k_head, k_row, scale,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """This program's q (BLOCK, DIM) and k (KEYS, DIM), scores, which keys count, and places of queries."""
    program = tl.program_id(1).to(tl.int64)
    sample, head = program // heads, program % heads
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j, d = tl.arange(0, KEYS), tl.arange(0, DIM)
    q = tl.load(
        q_ptr + sample * q_batch + head * q_head + i[:, None] * q_row + d[None, :],
        mask=(i < queries)[:, None] & (d < dim)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    k = tl.load(
        k_ptr + sample * k_batch + head * k_head + j[:, None] * k_row + d[None, :],
        mask=(j < keys)[:, None] & (d < dim)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    counts = tl.load(columns_ptr + sample * keys + j, mask=j < keys, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where((j < keys)[None, :], scores, float("-inf"))
    return q, k, scores, counts, i, program * queries + i


@triton.jit
def _forward_kernel(
    out_ptr, denominator_ptr, q_ptr, k_ptr, columns_ptr, heads, queries, keys, dim,
    q_batch, q_head, q_row, k_batch, k_head, k_row, scale,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """out = sum over keys that count of softmax(scores)^2, and the log of its denominator"""
    _, _, scores, counts, i, at = _tile(
        q_ptr, k_ptr, columns_ptr, heads, queries, keys, dim,
        q_batch, q_head, q_row, k_batch, k_head, k_row, scale, BLOCK, KEYS, DIM,
    )  # fmt: skip
    top = tl.max(scores, axis=1)
    p = tl.exp(scores - top[:, None])
    total = tl.sum(p, axis=1)
    p = p / total[:, None]
    tl.store(out_ptr + at, tl.sum(p * p * counts[None, :], axis=1), mask=i < queries)
    tl.store(denominator_ptr + at, top + tl.log(total), mask=i < queries)


@triton.jit
def _backward_kernel(
    dq_ptr, partial_ptr, dout_ptr, denominator_ptr, q_ptr, k_ptr, columns_ptr, heads, queries, keys, dim,
    q_batch, q_head, q_row, k_batch, k_head, k_row, scale,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and in partial[block] what they add to dk"""
    q, k, scores, counts, i, at = _tile(
        q_ptr, k_ptr, columns_ptr, heads, queries, keys, dim,
        q_batch, q_head, q_row, k_batch, k_head, k_row, scale, BLOCK, KEYS, DIM,
    )  # fmt: skip
    denominator = tl.load(denominator_ptr + at, mask=i < queries, other=0.0)
    dout = tl.load(dout_ptr + at, mask=i < queries, other=0.0)
    p = tl.exp(scores - denominator[:, None])
    gp = 2.0 * p * p * counts[None, :] * dout[:, None]
    ds = (gp - p * tl.sum(gp, axis=1)[:, None]) * scale
    ds = tl.where((i < queries)[:, None], ds, 0.0)
    d = tl.arange(0, DIM)
    dq = tl.dot(ds, k, input_precision="ieee")
    tl.store(
        dq_ptr + at[:, None] * dim + d[None, :], dq.to(dq_ptr.dtype.element_ty),
        mask=(i < queries)[:, None] & (d < dim)[None, :],
    )  # fmt: skip
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
    j = tl.arange(0, KEYS)
    block = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(
        partial_ptr + (block * keys + j[:, None]) * dim + d[None, :], dk,
        mask=(j < keys)[:, None] & (d < dim)[None, :],
    )  # fmt: skip


def _launch(q: Tensor, k: Tensor, elements: int) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """(grid, sizes and strides, the tile's shape); a tile of q or of scores has so many elements at most."""
    batch, heads, queries, dim = q.shape
    keys, wide = max(16, triton.next_power_of_2(k.shape[2])), max(16, triton.next_power_of_2(dim))
    block = max(16, min(triton.next_power_of_2(queries), elements // max(keys, wide)))
    sizes = (heads, queries, k.shape[2], dim, *q.stride()[:3], *k.stride()[:3])
    grid = (triton.cdiv(queries, block), batch * heads)
    return grid, sizes, {"BLOCK": block, "KEYS": keys, "DIM": wide}


def attention_columns(
    out: Tensor,
    denominator: Tensor,
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    scale: float,
    elements: int = 8192,
) -> None:
    """Write out and denominator, (B, H, N) without gaps."""
    grid, sizes, tile = _launch(q, k, elements)
    _forward_kernel[grid](out, denominator, q, k, columns, *sizes, scale, **tile)


def attention_columns_backward(
    dq: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    denominator: Tensor,
    scale: float,
    elements: int = 4096,
) -> Tensor:
    """Write dq, without gaps, and return dk, which is summed over blocks of queries in their order."""
    grid, sizes, tile = _launch(q, k, elements)
    partial = denominator.new_empty((grid[0], *k.shape))
    _backward_kernel[grid](dq, partial, dout, denominator, q, k, columns, *sizes, scale, **tile)
    return partial.sum(0).to(k.dtype)
