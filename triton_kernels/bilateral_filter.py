"""Triton kernel of `pumice.ops.bilateral_filter`; arguments and meaning as in its reference."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mirrored(i, n):
    period = tl.maximum(2 * (n - 1), 1)
    i = tl.abs(i) % period
    return tl.where(i < n, i, period - i)


@triton.jit
def _bilateral_kernel(
    out_ptr, x_ptr,
    height, width, size, blocks, space, color,
    CHANNELS: tl.constexpr, ROUNDED: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sum w x / sum w over a disc, w = exp2(space * distance^2 + color * difference^2)"""
    program = tl.program_id(0).to(tl.int64)  # the one axis that has no small limit
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, ROUNDED)
    planes = (program // blocks * CHANNELS + channel)[:, None] * size
    inside = (channel < CHANNELS)[:, None] & (i < size)[None, :]
    y = i // width
    x = i % width
    center = tl.load(x_ptr + planes + i[None, :], mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([ROUNDED, BLOCK], dtype=tl.float32)
    weights = tl.zeros([BLOCK], dtype=tl.float32)
    for dy in range(-RADIUS, RADIUS + 1):
        row = _mirrored(y + dy, height) * width
        for dx in range(-RADIUS, RADIUS + 1):
            squared = dy * dy + dx * dx
            if squared <= RADIUS * RADIUS:
                at = row + _mirrored(x + dx, width)
                other = tl.load(x_ptr + planes + at[None, :], mask=inside, other=0.0).to(tl.float32)
                distance = tl.sum(tl.abs(center - other), axis=0)
                weight = tl.exp2(space * squared + color * (distance * distance))
                weights += weight
                sums += weight[None, :] * other
    result = sums / weights[None, :]
    tl.store(out_ptr + planes + i[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)


def bilateral_filter(
    out: Tensor, images: Tensor, size: int, space: float, color: float, block: int = 512
) -> None:
    """Write the weighted means into out; both are contiguous."""
    batch, channels, height, width = images.shape
    blocks = triton.cdiv(height * width, block)
    _bilateral_kernel[(batch * blocks,)](
        out, images, height, width, height * width, blocks, space, color,
        CHANNELS=channels, ROUNDED=triton.next_power_of_2(channels), RADIUS=size // 2, BLOCK=block,
    )  # fmt: skip
