"""Triton kernels of `pumice.ops.group_norm_silu`; arguments and meaning as in its references.

A program takes one channel's chunk of positions, in either layout: element (c, p) of a sample lies at
c * channel_stride + p * position_stride. In channels_last a program takes CHANNELS of them, side by side in
memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tile(channels, size, channel_stride, position_stride, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's sample, channels (CHANNELS, 1), offsets within the sample, and which of them exist."""
    sample = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return sample, c, c * channel_stride + p * position_stride, (c < channels) & (p < size)


@triton.jit
def _channel(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, c, channels, groups):
    """(CHANNELS, 1) of each: what the channels of a program need."""
    group = sample * groups + c // (channels // groups)
    exists = c < channels
    mean = tl.load(mean_ptr + group, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=exists, other=0.0)
    weight = tl.load(weight_ptr + c, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=exists, other=0.0).to(tl.float32)
    return mean, rstd, weight, bias


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _moments_kernel(
    partial_ptr, x_ptr, channels, size, channel_stride, position_stride,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[:, sample, c, chunk] = (mean, sum of squared distances from it) of the chunk"""
    sample, c, at, inside = _tile(channels, size, channel_stride, position_stride, CHANNELS, BLOCK)
    x = tl.load(x_ptr + sample * channels * size + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(size - tl.program_id(0).to(tl.int64) * BLOCK, BLOCK)
    mean = tl.sum(x, axis=1)[:, None] / count
    distance = tl.where(inside, x - mean, 0.0)
    chunks = tl.num_programs(0).to(tl.int64)
    to = partial_ptr + (sample * channels + c) * chunks + tl.program_id(0)
    tl.store(to, mean, mask=c < channels)
    tl.store(
        to + chunks * channels * tl.num_programs(2),
        tl.sum(distance * distance, axis=1)[:, None],
        mask=c < channels,
    )


@triton.jit
def _forward_kernel(
    y_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    channels, size, groups, channel_stride, position_stride,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z = (x - mean) * rstd * weight + bias; y = z * sigmoid(z)"""
    sample, c, at, inside = _tile(channels, size, channel_stride, position_stride, CHANNELS, BLOCK)
    mean, rstd, weight, bias = _channel(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, c, channels, groups)
    at += sample * channels * size
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z = (x - mean) * rstd * weight + bias
    tl.store(y_ptr + at, (z * _sigmoid(z)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(x_ptr, dy_ptr, at, inside, mean, rstd, weight, bias):
    """(normal, dz) of each element; 0 where there is none."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normal = (x - mean) * rstd
    z = normal * weight + bias
    s = _sigmoid(z)
    return normal, dy * (s + z * s * (1.0 - s))


@triton.jit
def _sums_kernel(
    partial_ptr, dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    channels, size, groups, channel_stride, position_stride,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[sample, :, c, chunk] = sums over the chunk of (dz, dz * normal)"""
    sample, c, at, inside = _tile(channels, size, channel_stride, position_stride, CHANNELS, BLOCK)
    mean, rstd, weight, bias = _channel(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, c, channels, groups)
    at += sample * channels * size
    normal, dz = _gradient(x_ptr, dy_ptr, at, inside, mean, rstd, weight, bias)
    chunks = tl.num_programs(0).to(tl.int64)
    to = partial_ptr + (sample * 2 * channels + c) * chunks + tl.program_id(0)
    tl.store(to, tl.sum(dz, axis=1)[:, None], mask=c < channels)
    tl.store(to + chunks * channels, tl.sum(dz * normal, axis=1)[:, None], mask=c < channels)


@triton.jit
def _backward_kernel(
    dx_ptr, dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group_means_ptr,
    channels, size, groups, channel_stride, position_stride,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (weight * dz - mean(weight * dz) - normal * mean(weight * dz * normal))"""
    sample, c, at, inside = _tile(channels, size, channel_stride, position_stride, CHANNELS, BLOCK)
    mean, rstd, weight, bias = _channel(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sample, c, channels, groups)
    group = group_means_ptr + sample * 2 * groups + c // (channels // groups)
    mean_dz = tl.load(group, mask=c < channels, other=0.0)
    mean_dzn = tl.load(group + groups, mask=c < channels, other=0.0)
    at += sample * channels * size
    normal, dz = _gradient(x_ptr, dy_ptr, at, inside, mean, rstd, weight, bias)
    dx = rstd * (weight * dz - mean_dz - normal * mean_dzn)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor, channels_last: bool, block: int
) -> tuple[tuple[int, int, int], tuple[int, int], dict[str, Any]]:
    """(grid, (channel stride, position stride), the tile's shape) for a tile of `block` elements."""
    batch, channels, size = x.shape[0], x.shape[1], x[0, 0].numel()
    wide = min(triton.next_power_of_2(channels), 64) if channels_last else 1
    long = min(triton.next_power_of_2(size), block // wide)
    grid = (triton.cdiv(size, long), triton.cdiv(channels, wide), batch)
    return grid, (1, channels) if channels_last else (size, 1), {"CHANNELS": wide, "BLOCK": long}


def group_norm_silu(
    y: Tensor,
    x: Tensor,
    channels_last: bool,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    block: int = 4096,
) -> None:
    """Write y, mean and rstd; x and y are dense and lie alike."""
    batch, channels, size = x.shape[0], x.shape[1], x[0, 0].numel()
    groups = mean.shape[1]
    grid, strides, tile = _launch(x, channels_last, block)
    chunks = grid[0]
    partial = torch.empty(2, batch, channels, chunks, dtype=torch.float32, device=x.device)
    _moments_kernel[grid](partial, x, channels, size, *strides, **tile)

    # Chan's merge of all chunks of a group at once.
    counts = torch.full((chunks,), tile["BLOCK"], dtype=torch.float32, device=x.device)
    counts[-1] = size - (chunks - 1) * tile["BLOCK"]
    means, m2 = partial.view(2, batch, groups, -1, chunks)
    total = size * (channels // groups)
    torch.div((means * counts).sum((2, 3)), total, out=mean)
    distance = means - mean[..., None, None]
    variance = (m2.sum((2, 3)) + (distance * distance * counts).sum((2, 3))) / total
    torch.rsqrt(variance + eps, out=rstd)
    _forward_kernel[grid](y, x, mean, rstd, weight, bias, channels, size, groups, *strides, **tile)


def group_norm_silu_backward(
    dx: Tensor,
    dy: Tensor,
    x: Tensor,
    channels_last: bool,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor,
    block: int = 4096,
) -> None:
    """Write dx and sums, (B, 2, C): of dz and of dz * normal."""
    batch, channels, size = x.shape[0], x.shape[1], x[0, 0].numel()
    groups = mean.shape[1]
    grid, strides, tile = _launch(x, channels_last, block)
    affine = (mean, rstd, weight, bias)
    shape = (channels, size, groups)
    partial = torch.empty(batch, 2, channels, grid[0], dtype=torch.float32, device=x.device)
    _sums_kernel[grid](partial, dy, x, *affine, *shape, *strides, **tile)
    torch.sum(partial, dim=3, out=sums)
    weighted = (sums * weight.float()).view(batch, 2, groups, -1)
    group_means = weighted.sum(3) / (size * (channels // groups))
    _backward_kernel[grid](dx, dy, x, *affine, group_means, *shape, *strides, **tile)
