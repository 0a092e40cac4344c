"""Triton kernels of `pumice.ops.differentiable_jpeg`; arguments and meaning as in its references.

A program takes 32 x 32 pixels, whose blocks are transformed by products with a matrix that has the DCT's
eight rows again and again on its diagonal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(a, b, c):
    return tl.dot(tl.dot(a, b, input_precision="ieee"), c, input_precision="ieee")


@triton.jit
def _matrix(dct_ptr, SIDE: tl.constexpr):
    return tl.load(dct_ptr + tl.arange(0, SIDE)[:, None] * 32 + tl.arange(0, SIDE)[None, :])


@triton.jit
def _dct(x, matrix):
    return _product(matrix, x, tl.trans(matrix))


@triton.jit
def _inverse_dct(x, matrix):
    return _product(tl.trans(matrix), x, matrix)


@triton.jit
def _table(tables_ptr, sample, plane, SIDE: tl.constexpr):
    """The table of luma (0) or chroma (1), again and again."""
    i = tl.arange(0, SIDE)
    return tl.load(tables_ptr + (sample * 2 + plane) * 64 + (i % 8)[:, None] * 8 + (i % 8)[None, :])


@triton.jit
def _round(x):
    """Halves to the even one."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _slope(x):
    rest = x - _round(x)
    return 3.0 * rest * rest


@triton.jit
def _tile(blocks_down, blocks_across):
    """(sample, first row, first column) of this program's pixels."""
    program = tl.program_id(0).to(tl.int64)
    tile = program % (blocks_down * blocks_across)
    sample = program // (blocks_down * blocks_across)
    return sample, (tile // blocks_across * 32).to(tl.int32), (tile % blocks_across * 32).to(tl.int32)


@triton.jit
def _load_rgb(data_ptr, sample, at, size, inside):
    """Red, green and blue at places `at` of a sample's planes of `size`."""
    at += sample * 3 * size
    red = tl.load(data_ptr + at, mask=inside, other=0.0).to(tl.float32)
    green = tl.load(data_ptr + (at + size), mask=inside, other=0.0).to(tl.float32)
    blue = tl.load(data_ptr + (at + size + size), mask=inside, other=0.0).to(tl.float32)
    return red, green, blue


@triton.jit
def _store_three(to_ptr, sample, at, size, inside, first, second, third):
    dtype = to_ptr.dtype.element_ty
    at += sample * 3 * size
    tl.store(to_ptr + at, first.to(dtype), mask=inside)
    tl.store(to_ptr + (at + size), second.to(dtype), mask=inside)
    tl.store(to_ptr + (at + size + size), third.to(dtype), mask=inside)


@triton.jit
def _ycc(images_ptr, sample, row, column, height, width, size):
    """Of pixels (row, column), of which those beyond the picture are its last ones."""
    at = tl.minimum(row, height - 1).to(tl.int64) * width + tl.minimum(column, width - 1)
    red, green, blue = _load_rgb(images_ptr, sample, at, size, at >= 0)
    red, green, blue = red * 255, green * 255, blue * 255
    luma = 0.299 * red + 0.587 * green + 0.114 * blue - 128
    return luma, (blue - luma - 128) / 1.772, (red - luma - 128) / 1.402


@triton.jit
def _chroma(images_ptr, sample, top, left, height, width, size):
    """(16, 16) of each chroma: the mean of 2 x 2 pixels."""
    blueness = tl.zeros((16, 16), tl.float32)
    redness = tl.zeros((16, 16), tl.float32)
    row = top + 2 * tl.arange(0, 16)[:, None]
    column = left + 2 * tl.arange(0, 16)[None, :]
    for k in tl.static_range(4):
        _, b, r = _ycc(images_ptr, sample, row + k // 2, column + k % 2, height, width, size)
        blueness += 0.25 * b
        redness += 0.25 * r
    return blueness, redness


@triton.jit
def _code_kernel(
    luma_ptr, chroma_ptr, images_ptr, tables_ptr, dct_ptr, height, width, size, blocks_down, blocks_across,
):  # fmt: skip
    """Decoded luma (B, H', W') and chroma (B, 2, H' / 2, W' / 2), H' and W' whole tiles of 32."""
    sample, top, left = _tile(blocks_down, blocks_across)
    side = tl.arange(0, 32)
    row, column = top + side[:, None], left + side[None, :]
    luma, _, _ = _ycc(images_ptr, sample, row, column, height, width, size)
    dct = _matrix(dct_ptr, 32)
    table = _table(tables_ptr, sample, 0, 32)
    luma = _inverse_dct(_round(_dct(luma, dct) / table) * table, dct)
    down, across = blocks_down * 32, blocks_across * 32
    tl.store(luma_ptr + (sample * down + row) * across + column, luma)

    blueness, redness = _chroma(images_ptr, sample, top, left, height, width, size)
    dct = _matrix(dct_ptr, 16)
    table = _table(tables_ptr, sample, 1, 16)
    blueness = _inverse_dct(_round(_dct(blueness, dct) / table) * table, dct)
    redness = _inverse_dct(_round(_dct(redness, dct) / table) * table, dct)
    half = tl.arange(0, 16)
    i, j = top // 2 + half[:, None], left // 2 + half[None, :]
    at = chroma_ptr + (sample * down + i) * (across // 2) + j
    tl.store(at, blueness)
    tl.store(at + (down // 2) * (across // 2), redness)


@triton.jit
def _interpolated(chroma_ptr, row, column, inside, height, width, across):
    """Chroma of pixels by weights of 3/4 and 1/4, along the columns, then along the rows."""
    i, j = row // 2, column // 2
    far_i = tl.where(row % 2 == 1, tl.minimum(i + 1, (height + 1) // 2 - 1), tl.maximum(i - 1, 0))
    far_j = tl.where(column % 2 == 1, tl.minimum(j + 1, (width + 1) // 2 - 1), tl.maximum(j - 1, 0))
    near = 0.75 * tl.load(chroma_ptr + i * across + j, mask=inside, other=0.0)
    near += 0.25 * tl.load(chroma_ptr + far_i * across + j, mask=inside, other=0.0)
    far = 0.75 * tl.load(chroma_ptr + i * across + far_j, mask=inside, other=0.0)
    far += 0.25 * tl.load(chroma_ptr + far_i * across + far_j, mask=inside, other=0.0)
    return 0.75 * near + 0.25 * far


@triton.jit
def _decoded(luma_ptr, chroma_ptr, sample, row, column, inside, height, width, down, across):
    """(red, green, blue), not clamped yet."""
    luma = tl.load(luma_ptr + (sample * down + row) * across + column, mask=inside, other=0.0)
    chroma_ptr += sample * down * (across // 2)
    blueness = _interpolated(chroma_ptr, row, column, inside, height, width, across // 2)
    chroma_ptr += (down // 2) * (across // 2)
    redness = _interpolated(chroma_ptr, row, column, inside, height, width, across // 2)
    red, blue = luma + 1.402 * redness, luma + 1.772 * blueness
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return (red + 128) / 255, (green + 128) / 255, (blue + 128) / 255


@triton.jit
def _clamp(value):
    value = tl.where(value < 0, 0.0, value)  # by comparison, so that a NaN stays NaN
    return tl.where(value > 1, 1.0, value)


@triton.jit
def _pixels(width, size, blocks, BLOCK: tl.constexpr):
    """(sample, row, column, place in a plane, whether there is one) of BLOCK pixels."""
    program = tl.program_id(0).to(tl.int64)
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return program // blocks, i // width, i % width, i, i < size


@triton.jit
def _decode_kernel(
    out_ptr, luma_ptr, chroma_ptr, height, width, size, blocks, down, across, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, row, column, at, inside = _pixels(width, size, blocks, BLOCK)
    red, green, blue = _decoded(
        luma_ptr, chroma_ptr, sample, row, column, inside, height, width, down, across
    )
    _store_three(out_ptr, sample, at, size, inside, _clamp(red), _clamp(green), _clamp(blue))


@triton.jit
def _decoded_gradient_kernel(
    to_ptr, grad_ptr, luma_ptr, chroma_ptr, height, width, size, blocks, down, across,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """to (B, 3, H, W) = the gradient in what was decoded of each pixel: luma, blueness, redness"""
    sample, row, column, at, inside = _pixels(width, size, blocks, BLOCK)
    red, green, blue = _decoded(
        luma_ptr, chroma_ptr, sample, row, column, inside, height, width, down, across
    )
    d_red, d_green, d_blue = _load_rgb(grad_ptr, sample, at, size, inside)
    d_red = tl.where((red >= 0) & (red <= 1), d_red, 0.0)
    d_green = tl.where((green >= 0) & (green <= 1), d_green, 0.0) / 0.587
    d_blue = tl.where((blue >= 0) & (blue <= 1), d_blue, 0.0)
    d_red -= 0.299 * d_green
    d_blue -= 0.114 * d_green
    luma = d_red + d_green + d_blue
    _store_three(to_ptr, sample, at, size, inside, luma, 1.772 * d_blue, 1.402 * d_red)


@triton.jit
def _gathered(pixels_ptr, i, j, height, width):
    """The gradient in samples of chroma, from the 4 x 4 pixels that each was interpolated to. Beyond the
    picture lie its first pixels again, and its last ones where their number is even."""
    total = tl.zeros((16, 16), tl.float32)
    for k in tl.static_range(16):
        row = 2 * i + k // 4 - 1
        column = 2 * j + k % 4 - 1
        row = tl.where((row == height) & (height % 2 == 0), height - 1, tl.maximum(row, 0))
        column = tl.where((column == width) & (width % 2 == 0), width - 1, tl.maximum(column, 0))
        inside = (row < height) & (column < width) & (2 * i < height) & (2 * j < width)
        down = 0.25 if (k // 4) % 3 == 0 else 0.75
        along = 0.25 if (k % 4) % 3 == 0 else 0.75
        at = row.to(tl.int64) * width + column
        total += (down * along) * tl.load(pixels_ptr + at, mask=inside, other=0.0)
    return total


@triton.jit
def _gradient_kernel(
    out_ptr, pixels_ptr, images_ptr, tables_ptr, dct_ptr, height, width, size, blocks_down, blocks_across,
):  # fmt: skip
    """The gradient in the pictures, from that in what was decoded of each pixel."""
    sample, top, left = _tile(blocks_down, blocks_across)
    side = tl.arange(0, 32)
    row, column = top + side[:, None], left + side[None, :]
    inside = (row < height) & (column < width)
    pixels_ptr += sample * 3 * size
    # The last row and column were repeated to whole macroblocks: theirs is the sum over all repetitions.
    whole_height, whole_width = (height + 15) // 16 * 16, (width + 15) // 16 * 16
    source = tl.minimum(top + side, height - 1)[None, :]
    down = ((source == row) & ((top + side)[None, :] < whole_height)).to(tl.float32)
    source = tl.minimum(left + side, width - 1)[:, None]
    across = ((source == column) & ((left + side)[:, None] < whole_width)).to(tl.float32)

    # A sample of chroma is the mean of four pixels.
    half = tl.arange(0, 16)
    mean = tl.where(side[:, None] // 2 == half[None, :], 0.5, 0.0)
    half_down = tl.dot(down, mean, input_precision="ieee")
    half_across = tl.dot(tl.trans(mean), across, input_precision="ieee")
    i, j = top // 2 + half[:, None], left // 2 + half[None, :]
    blueness, redness = _chroma(images_ptr, sample, top, left, height, width, size)
    dct = _matrix(dct_ptr, 16)
    table = _table(tables_ptr, sample, 1, 16)
    gradient = _dct(_gathered(pixels_ptr + size, i, j, height, width), dct)
    gradient = _inverse_dct(gradient * _slope(_dct(blueness, dct) / table), dct)
    blueness = _product(half_down, gradient, half_across) / 1.772
    gradient = _dct(_gathered(pixels_ptr + size + size, i, j, height, width), dct)
    gradient = _inverse_dct(gradient * _slope(_dct(redness, dct) / table), dct)
    redness = _product(half_down, gradient, half_across) / 1.402

    luma, _, _ = _ycc(images_ptr, sample, row, column, height, width, size)
    dct = _matrix(dct_ptr, 32)
    slope = _slope(_dct(luma, dct) / _table(tables_ptr, sample, 0, 32))
    gradient = tl.load(pixels_ptr + row.to(tl.int64) * width + column, mask=inside, other=0.0)
    luma = _product(down, _inverse_dct(_dct(gradient, dct) * slope, dct), across)
    luma = luma - blueness - redness
    red, blue = 0.299 * luma + redness, 0.114 * luma + blueness
    at = row.to(tl.int64) * width + column
    _store_three(out_ptr, sample, at, size, inside, red, 0.587 * luma, blue)


def _dct_matrix(device: torch.device) -> Tensor:
    """(32, 32), of blocks of 8 x 8."""
    k = torch.arange(32, device=device)[:, None]
    n = torch.arange(32, device=device)
    wave = torch.cos(torch.pi / 8 * (n % 8 + 0.5).double() * (k % 8)) / 2
    wave = torch.where(k % 8 == 0, 8**-0.5, wave)
    return torch.where(k // 8 == n // 8, wave, 0.0).float()


def _code(images: Tensor, tables: Tensor, dct: Tensor) -> tuple[Tensor, Tensor]:
    """Decoded luma and chroma."""
    batch, _, height, width = images.shape
    down, across = triton.cdiv(height, 32), triton.cdiv(width, 32)
    luma = torch.empty(batch, 32 * down, 32 * across, dtype=torch.float32, device=images.device)
    chroma = torch.empty(batch, 2, 16 * down, 16 * across, dtype=torch.float32, device=images.device)
    _code_kernel[(batch * down * across,)](
        luma, chroma, images, tables, dct, height, width, height * width, down, across, num_warps=8
    )
    return luma, chroma


def differentiable_jpeg(out: Tensor, images: Tensor, tables: Tensor, block: int = 1024) -> None:
    """Write the pictures into out; all dense."""
    batch, _, height, width = images.shape
    luma, chroma = _code(images, tables, _dct_matrix(images.device))
    size = height * width
    blocks = triton.cdiv(size, block)
    _decode_kernel[(batch * blocks,)](
        out, luma, chroma, height, width, size, blocks, *luma.shape[1:], BLOCK=block
    )


def differentiable_jpeg_backward(
    out: Tensor, grad: Tensor, images: Tensor, tables: Tensor, block: int = 1024
) -> None:
    """Write the gradient in the pictures into out; all dense."""
    batch, _, height, width = images.shape
    dct = _dct_matrix(images.device)
    luma, chroma = _code(images, tables, dct)
    size = height * width
    blocks = triton.cdiv(size, block)
    pixels = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    _decoded_gradient_kernel[(batch * blocks,)](
        pixels, grad, luma, chroma, height, width, size, blocks, *luma.shape[1:], BLOCK=block
    )
    down, across = luma.shape[1] // 32, luma.shape[2] // 32
    _gradient_kernel[(batch * down * across,)](
        out, pixels, images, tables, dct, height, width, size, down, across, num_warps=8
    )
