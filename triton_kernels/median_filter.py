"""Triton kernel of `pumice.ops.median_filter`; arguments and meaning as in its reference."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _median_kernel(
    out_ptr, x_ptr,
    height, width, size, blocks,
    SIZE: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = median of the SIZE x SIZE values around each, found bit by bit from the highest"""
    program = tl.program_id(0).to(tl.int64)  # the one axis that has no small limit
    plane = program // blocks * size
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    place = tl.arange(0, ROUNDED)  # in the window
    y = (i // width)[:, None] + (place // SIZE - SIZE // 2)[None, :]
    x = (i % width)[:, None] + (place % SIZE - SIZE // 2)[None, :]
    y = tl.minimum(tl.maximum(y, 0), height - 1)
    x = tl.minimum(tl.maximum(x, 0), width - 1)
    real = inside[:, None] & (place < SIZE * SIZE)[None, :]
    value = tl.load(x_ptr + plane + y * width + x, mask=real, other=0.0).to(tl.float32)
    nan = tl.sum((value != value).to(tl.int32), axis=1)
    # As integers that sort as the floats do; what is no value is never below anything.
    bits = value.to(tl.int32, bitcast=True)
    keys = tl.where(real, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    negative = tl.sum((keys < 0).to(tl.int32), axis=1) > SIZE * SIZE // 2
    median = tl.where(negative, -2147483648, 0)
    for step in range(31):
        candidate = median + (1 << (30 - step))
        below = tl.sum((keys < candidate[:, None]).to(tl.int32), axis=1)
        median = tl.where(below <= SIZE * SIZE // 2, candidate, median)
    result = (median ^ ((median >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    result = tl.where(nan != 0, float("nan"), result)
    tl.store(out_ptr + plane + i, result.to(out_ptr.dtype.element_ty), mask=inside)


def median_filter(out: Tensor, images: Tensor, size: int, values: int = 4096) -> None:
    """Write the medians into out; both are contiguous. A program holds so many values of windows."""
    batch, channels, height, width = images.shape
    rounded = triton.next_power_of_2(size * size)
    block = values // rounded
    blocks = triton.cdiv(height * width, block)
    _median_kernel[(batch * channels * blocks,)](
        out, images, height, width, height * width, blocks, SIZE=size, ROUNDED=rounded, BLOCK=block
    )
