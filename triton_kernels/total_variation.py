"""Triton kernel of `pumice.ops.total_variation`; arguments and meaning as in its reference."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _dual(
    ahead_ptr, right_ptr, down_ptr, row, column, exists, height, width, sigma, weight,
    ISOTROPIC: tl.constexpr,
):  # fmt: skip
    """The dual variables of a pixel after their step, from those before it."""
    at = row * width + column
    ahead = tl.load(ahead_ptr + at, mask=exists, other=0.0)
    on_right = exists & (column < width - 1)
    below = exists & (row < height - 1)
    right = tl.load(right_ptr + at, mask=on_right, other=0.0)
    down = tl.load(down_ptr + at, mask=below, other=0.0)
    right += sigma * tl.where(on_right, tl.load(ahead_ptr + at + 1, mask=on_right, other=0.0) - ahead, 0.0)
    down += sigma * tl.where(below, tl.load(ahead_ptr + at + width, mask=below, other=0.0) - ahead, 0.0)
    if ISOTROPIC:
        norm = tl.sqrt(right * right + down * down)
        scale = tl.where(norm > weight, weight / tl.where(norm > weight, norm, 1.0), 1.0)
        right *= scale
        down *= scale
    else:  # by comparison, so that a NaN stays NaN
        right = tl.where(right < -weight, -weight, right)
        right = tl.where(right > weight, weight, right)
        down = tl.where(down < -weight, -weight, down)
        down = tl.where(down > weight, weight, down)
    return right, down


@triton.jit
def _step_kernel(
    out_ptr, images_ptr, ahead_ptr, right_ptr, down_ptr, new_ahead_ptr, new_right_ptr, new_down_ptr,
    weights_ptr, channels, height, width, size, blocks, weight, sigma, pull, momentum,
    PER_SAMPLE: tl.constexpr, ISOTROPIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One iteration; the duals of the pixels above and on the left are computed once more."""
    program = tl.program_id(0).to(tl.int64)
    plane = program // blocks
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    row = i // width
    column = i % width
    if PER_SAMPLE:
        weight = tl.load(weights_ptr + plane // channels)
    base = plane * size
    ahead_ptr += base
    right_ptr += base
    down_ptr += base
    right, down = _dual(
        ahead_ptr, right_ptr, down_ptr, row, column, inside, height, width, sigma, weight, ISOTROPIC
    )
    left, _ = _dual(
        ahead_ptr, right_ptr, down_ptr, row, column - 1, inside & (column > 0), height, width, sigma,
        weight, ISOTROPIC,
    )  # fmt: skip
    _, above = _dual(
        ahead_ptr, right_ptr, down_ptr, row - 1, column, inside & (row > 0), height, width, sigma,
        weight, ISOTROPIC,
    )  # fmt: skip
    f = tl.load(images_ptr + base + i, mask=inside, other=0.0)
    x = tl.load(out_ptr + base + i, mask=inside, other=0.0)
    new = x + pull * (f + (right - left) + (down - above) - x)
    tl.store(out_ptr + base + i, new, mask=inside)
    tl.store(new_ahead_ptr + base + i, new + momentum * (new - x), mask=inside)
    tl.store(new_right_ptr + base + i, right, mask=inside)
    tl.store(new_down_ptr + base + i, down, mask=inside)


def total_variation(
    out: Tensor,
    images: Tensor,
    weight: float,
    weights: Tensor | None,
    iterations: int,
    isotropic: bool,
    block: int = 1024,
) -> None:
    """Write the denoised planes into out; both dense, float32."""
    batch, channels, height, width = images.shape
    size = height * width
    blocks = triton.cdiv(size, block)
    out.copy_(images)
    state = torch.zeros(2, 3, *images.shape, dtype=torch.float32, device=images.device)
    state[0, 0] = images
    tau = 1 / math.sqrt(8)
    for iteration in range(iterations):
        momentum = 1 / math.sqrt(1 + 2 * 0.4 * tau)
        now, after = iteration % 2, 1 - iteration % 2
        _step_kernel[(batch * channels * blocks,)](
            out, images, *state[now], *state[after], images if weights is None else weights,
            channels, height, width, size, blocks, weight, 1 / (8 * tau), tau / (1 + tau), momentum,
            PER_SAMPLE=weights is not None, ISOTROPIC=isotropic, BLOCK=block,
        )  # fmt: skip
        tau *= momentum
