"""Triton kernels of `pumice.ops.guidance_magnitude`; arguments and meaning as in its reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_channel(dd, uu, du, cond, uncond):
    """The three products of d = cond - uncond and u = uncond, added to what the earlier channels gave."""
    d = cond - uncond
    return dd + d * d, uu + uncond * uncond, du + d * uncond


@triton.jit
def store_sums(to, dd, uu, du):
    """to[0:4] = sums over the positions of dd, uu, du and their cosines."""
    cosine = du / (tl.maximum(tl.sqrt(dd), 1e-8) * tl.maximum(tl.sqrt(uu), 1e-8))
    tl.store(to, tl.sum(dd, axis=0))
    tl.store(to + 1, tl.sum(uu, axis=0))
    tl.store(to + 2, tl.sum(du, axis=0))
    tl.store(to + 3, tl.sum(cosine, axis=0))


@triton.jit
def _sums_kernel(
    partial_ptr, cond_ptr, uncond_ptr,
    channels, positions, cond_stride, uncond_stride, position_stride, channel_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[sample, chunk] = the four sums over BLOCK positions"""
    sample = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0).to(tl.int64)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = p < positions
    dd = tl.zeros([BLOCK], dtype=tl.float32)
    uu = tl.zeros([BLOCK], dtype=tl.float32)
    du = tl.zeros([BLOCK], dtype=tl.float32)
    at = p * position_stride
    for _ in range(channels):
        cond = tl.load(cond_ptr + sample * cond_stride + at, mask=inside, other=0.0).to(tl.float32)
        uncond = tl.load(uncond_ptr + sample * uncond_stride + at, mask=inside, other=0.0).to(tl.float32)
        dd, uu, du = add_channel(dd, uu, du, cond, uncond)
        at += channel_stride
    store_sums(partial_ptr + (sample * tl.num_programs(0) + chunk) * 4, dd, uu, du)


def walk(channels: int, positions: int, channels_last: bool) -> tuple[int, int]:
    """(position stride, channel stride) of a dense sample."""
    return (channels, 1) if channels_last else (1, positions)


def guidance_magnitude(
    out: Tensor, cond: Tensor, uncond: Tensor, channels_last: bool, block: int = 1024
) -> None:
    """Write the (B, 4) sums into out; the samples are dense and lie alike."""
    batch, channels, positions = cond.shape[0], cond.shape[1], cond[0, 0].numel()
    grid = (triton.cdiv(positions, block), batch)
    strides = cond.stride(0), uncond.stride(0) if uncond.shape[0] > 1 else 0
    partial = torch.empty(batch, grid[0], 4, dtype=torch.float32, device=cond.device)
    _sums_kernel[grid](
        partial, cond, uncond, channels, positions, *strides, *walk(channels, positions, channels_last),
        BLOCK=block,
    )  # fmt: skip
    out.copy_(partial.sum(1, dtype=torch.float64))
