"""Triton kernel of `pumice.ops.guidance_step`; arguments and meaning as in its reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pumice.triton_kernels.guidance_magnitude import add_channel, store_sums, walk


@triton.jit
def _step_kernel(
    out_ptr, x_ptr, cond_ptr, uncond_ptr, noise_ptr, partial_ptr, scales_ptr, coefficients_ptr,
    channels, positions, out_stride, x_stride, cond_stride, uncond_stride, noise_stride,
    position_stride, channel_stride, scale, coefficients_stride, clip,
    PREDICTION: tl.constexpr, PER_SAMPLE: tl.constexpr, NOISE: tl.constexpr, CLIP: tl.constexpr,
    SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """new = k_x0 x0 + k_eps eps + k_x x + k_noise noise, of out = uncond + scale (cond - uncond)"""
    sample = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0).to(tl.int64)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = p < positions
    if PER_SAMPLE:
        scale = tl.load(scales_ptr + sample)
    row = coefficients_ptr + sample * coefficients_stride
    alpha = tl.load(row)
    sigma = tl.load(row + 1)
    k_x0 = tl.load(row + 2)
    k_eps = tl.load(row + 3)
    k_x = tl.load(row + 4)
    k_noise = tl.load(row + 5)
    dd = tl.zeros([BLOCK], dtype=tl.float32)
    uu = tl.zeros([BLOCK], dtype=tl.float32)
    du = tl.zeros([BLOCK], dtype=tl.float32)
    at = p * position_stride
    for _ in range(channels):
        x = tl.load(x_ptr + sample * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        cond = tl.load(cond_ptr + sample * cond_stride + at, mask=inside, other=0.0).to(tl.float32)
        uncond = tl.load(uncond_ptr + sample * uncond_stride + at, mask=inside, other=0.0).to(tl.float32)
        guided = uncond + scale * (cond - uncond)
        if PREDICTION == 0:
            x0 = (x - sigma * guided) / alpha
            eps = guided
        elif PREDICTION == 1:
            x0 = alpha * x - sigma * guided
            eps = alpha * guided + sigma * x
        else:
            x0 = x - sigma * guided
            eps = x + alpha * guided
        if CLIP:  # by comparison, so that a NaN stays NaN
            x0 = tl.where(x0 < -clip, -clip, x0)
            x0 = tl.where(x0 > clip, clip, x0)
        new = k_x0 * x0 + k_eps * eps + k_x * x
        if NOISE:
            noise = tl.load(noise_ptr + sample * noise_stride + at, mask=inside, other=0.0).to(tl.float32)
            new += k_noise * noise
        tl.store(out_ptr + sample * out_stride + at, new.to(out_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            dd, uu, du = add_channel(dd, uu, du, cond, uncond)
        at += channel_stride
    if SUMS:
        store_sums(partial_ptr + (sample * tl.num_programs(0) + chunk) * 4, dd, uu, du)


def guidance_step(
    out: Tensor,
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    noise: Tensor | None,
    sums: Tensor | None,
    batch: int,
    channels: int,
    positions: int,
    channels_last: bool,
    scale: float,
    scales: Tensor | None,
    coefficients: Tensor,
    prediction: int,
    clip: float,
    block: int = 1024,
) -> None:
    """Write the new sample into out, and the (B, 4) sums into `sums` where given; samples lie alike."""
    grid = (triton.cdiv(positions, block), batch)
    partial = out if sums is None else torch.empty(batch, grid[0], 4, dtype=torch.float32, device=x.device)
    tensors = (out, x, cond, uncond, x if noise is None else noise)
    _step_kernel[grid](
        *tensors, partial, x if scales is None else scales, coefficients,
        channels, positions, *(t.stride(0) if t.shape[0] > 1 else 0 for t in tensors),
        *walk(channels, positions, channels_last), scale,
        coefficients.stride(0) if coefficients.shape[0] > 1 else 0, clip,
        PREDICTION=prediction, PER_SAMPLE=scales is not None, NOISE=noise is not None,
        CLIP=clip != float("inf"), SUMS=sums is not None, BLOCK=block,
    )  # fmt: skip
    if sums is not None:
        sums.copy_(partial.sum(1, dtype=torch.float64))
