"""Triton kernels of `pumice.ops.pgd_step`; arguments and meaning as in its reference."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(x_ptr, grad_ptr, x0_ptr, sample, i, inside, x_stride, grad_stride, x0_stride):
    x = tl.load(x_ptr + sample * x_stride + i, mask=inside, other=0.0)
    x0 = tl.load(x0_ptr + sample * x0_stride + i, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + sample * grad_stride + i, mask=inside, other=0.0).to(tl.float32)
    return x, grad, x0


@triton.jit
def _clamp(value, lower, upper):
    # By comparison, so that a NaN value stays NaN.
    value = tl.where(value < lower, lower, value)
    return tl.where(value > upper, upper, value)


@triton.jit
def _linf_kernel(
    out_ptr, x_ptr, grad_ptr, x0_ptr, steps_ptr,
    size, out_stride, x_stride, grad_stride, x0_stride,
    step, eps, lower, upper,
    PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = clamp(x0 + clamp(x + step * sign(grad) - x0, -eps, eps), lower, upper)"""
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    x, grad, x0 = _load(x_ptr, grad_ptr, x0_ptr, sample, i, inside, x_stride, grad_stride, x0_stride)
    if PER_SAMPLE:
        step = tl.load(steps_ptr + sample)
    sign = tl.where(grad > 0, 1.0, 0.0) - tl.where(grad < 0, 1.0, 0.0)
    delta = _clamp((x + step * sign) - x0, -eps, eps)
    tl.store(out_ptr + sample * out_stride + i, _clamp(x0 + delta, lower, upper), mask=inside)


@triton.jit
def _sums_kernel(
    sums_ptr, x_ptr, grad_ptr, x0_ptr,
    size, x_stride, grad_stride, x0_stride, chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[sample, :, chunk] = (sum grad^2, sum delta * grad, sum delta^2), delta = x - x0"""
    sample = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0).to(tl.int64)
    i = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    x, grad, x0 = _load(x_ptr, grad_ptr, x0_ptr, sample, i, inside, x_stride, grad_stride, x0_stride)
    delta = x - x0
    to = sums_ptr + sample * 3 * chunks + chunk
    tl.store(to, tl.sum(grad * grad, axis=0))
    tl.store(to + chunks, tl.sum(delta * grad, axis=0))
    tl.store(to + 2 * chunks, tl.sum(delta * delta, axis=0))


@triton.jit
def _l2_kernel(
    out_ptr, x_ptr, grad_ptr, x0_ptr, scales_ptr,
    size, out_stride, x_stride, grad_stride, x0_stride,
    lower, upper,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = clamp(x0 + scales[1] * (x + scales[0] * grad - x0), lower, upper)"""
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    x, grad, x0 = _load(x_ptr, grad_ptr, x0_ptr, sample, i, inside, x_stride, grad_stride, x0_stride)
    step = tl.load(scales_ptr + sample * 2)
    project = tl.load(scales_ptr + sample * 2 + 1)
    delta = (x + step * grad) - x0
    tl.store(out_ptr + sample * out_stride + i, _clamp(x0 + project * delta, lower, upper), mask=inside)


def pgd_step(
    out: Tensor,
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    step_size: float,
    step_sizes: Tensor | None,
    eps: float,
    lower: float,
    upper: float,
    norm: str,
    block: int = 4096,
) -> None:
    """Write the step into out; the samples of all tensors are dense and lie alike."""
    import torch

    batch, size = x.shape[0], x[0].numel()
    grid = (triton.cdiv(size, block), batch)
    strides = [t.stride(0) for t in (out, x, grad, x0)]
    if norm == "linf":
        steps = x if step_sizes is None else step_sizes
        _linf_kernel[grid](
            out, x, grad, x0, steps, size, *strides, step_size, eps, lower, upper,
            PER_SAMPLE=step_sizes is not None, BLOCK=block,
        )  # fmt: skip
        return
    sums = torch.empty(batch, 3, grid[0], dtype=torch.float32, device=x.device)
    _sums_kernel[grid](sums, x, grad, x0, size, *strides[1:], grid[0], BLOCK=block)
    gg, dg, dd = sums.sum(2, dtype=torch.float64).unbind(1)
    step = (step_size if step_sizes is None else step_sizes) / gg.sqrt().clamp(min=1e-12)
    length = (dd + 2 * step * dg + step * step * gg).clamp(min=0).sqrt()
    project = torch.where(length > eps, eps / length, 1.0)
    scales = torch.stack([step, project], dim=1).float()
    _l2_kernel[grid](out, x, grad, x0, scales, size, *strides, lower, upper, BLOCK=block)
