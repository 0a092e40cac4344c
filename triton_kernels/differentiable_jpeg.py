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
def _dct_matrix(SIDE: tl.constexpr):
    k = tl.arange(0, SIDE)[:, None]
    n = tl.arange(0, SIDE)[None, :]
    turns = ((2 * (n % 8) + 1) * (k % 8)) % 32  # of the circle's 32nd parts: exact before the cosine
    wave = tl.cos(turns.to(tl.float32) * 0.19634954084936207) * 0.5
    wave = tl.where(k % 8 == 0, 0.35355339059327379, wave)
    return tl.where(k // 8 == n // 8, wave, 0.0)


@triton.jit
def _dct(x, SIDE: tl.constexpr):
    matrix = _dct_matrix(SIDE)
    return tl.dot(tl.dot(matrix, x, input_precision="ieee"), tl.trans(matrix), input_precision="ieee")


@triton.jit
def _inverse_dct(x, SIDE: tl.constexpr):
    matrix = _dct_matrix(SIDE)
    return tl.dot(tl.dot(tl.trans(matrix), x, input_precision="ieee"), matrix, input_precision="ieee")


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
    return sample, tile // blocks_across * 32, tile % blocks_across * 32


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
    at = tl.minimum(row, height - 1) * width + tl.minimum(column, width - 1)
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
    luma_ptr, chroma_ptr, images_ptr, tables_ptr, height, width, size, blocks_down, blocks_across,
):  # fmt: skip
    """Decoded luma (B, H', W') and chroma (B, 2, H' / 2, W' / 2), H' and W' whole tiles of 32."""
    sample, top, left = _tile(blocks_down, blocks_across)
    side = tl.arange(0, 32)
    row, column = top + side[:, None], left + side[None, :]
    luma, _, _ = _ycc(images_ptr, sample, row, column, height, width, size)
    table = _table(tables_ptr, sample, 0, 32)
    luma = _inverse_dct(_round(_dct(luma, 32) / table) * table, 32)
    down, across = blocks_down * 32, blocks_across * 32
    tl.store(luma_ptr + (sample * down + row) * across + column, luma)

    blueness, redness = _chroma(images_ptr, sample, top, left, height, width, size)
    table = _table(tables_ptr, sample, 1, 16)
    blueness = _inverse_dct(_round(_dct(blueness, 16) / table) * table, 16)
    redness = _inverse_dct(_round(_dct(redness, 16) / table) * table, 16)
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
        down: tl.constexpr = 0.75 if k // 4 == 1 or k // 4 == 2 else 0.25
        along: tl.constexpr = 0.75 if k % 4 == 1 or k % 4 == 2 else 0.25
        total += down * along * tl.load(pixels_ptr + row * width + column, mask=inside, other=0.0)
    return total


@triton.jit
def _doubled(x):
    """(16, 16) to (32, 32), each value four times."""
    wide = tl.arange(0, 32)[:, None] // 2 == tl.arange(0, 16)[None, :]
    wide = wide.to(tl.float32)
    return tl.dot(tl.dot(wide, x, input_precision="ieee"), tl.trans(wide), input_precision="ieee")


@triton.jit
def _gradient_kernel(
    out_ptr, pixels_ptr, images_ptr, tables_ptr, height, width, size, blocks_down, blocks_across,
):  # fmt: skip
    """The gradient in the pictures, from that in what was decoded of each pixel."""
    sample, top, left = _tile(blocks_down, blocks_across)
    side = tl.arange(0, 32)
    row, column = top + side[:, None], left + side[None, :]
    inside = (row < height) & (column < width)
    pixels_ptr += sample * 3 * size
    luma, _, _ = _ycc(images_ptr, sample, row, column, height, width, size)
    slope = _slope(_dct(luma, 32) / _table(tables_ptr, sample, 0, 32))
    gradient = tl.load(pixels_ptr + row * width + column, mask=inside, other=0.0)
    luma = _inverse_dct(_dct(gradient, 32) * slope, 32)

    half = tl.arange(0, 16)
    i, j = top // 2 + half[:, None], left // 2 + half[None, :]
    blueness, redness = _chroma(images_ptr, sample, top, left, height, width, size)
    table = _table(tables_ptr, sample, 1, 16)
    gradient = _dct(_gathered(pixels_ptr + size, i, j, height, width), 16)
    blueness = _doubled(_inverse_dct(gradient * _slope(_dct(blueness, 16) / table), 16)) * (0.25 / 1.772)
    gradient = _dct(_gathered(pixels_ptr + size + size, i, j, height, width), 16)
    redness = _doubled(_inverse_dct(gradient * _slope(_dct(redness, 16) / table), 16)) * (0.25 / 1.402)

    # The last row and column were repeated to whole macroblocks: theirs is the sum over all repetitions.
    whole_height, whole_width = (height + 15) // 16 * 16, (width + 15) // 16 * 16
    source = tl.minimum(top + side, height - 1)
    fold = (source[None, :] == row) & ((top + side)[None, :] < whole_height)
    down = fold.to(tl.float32)
    source = tl.minimum(left + side, width - 1)
    fold = (source[:, None] == column) & ((left + side)[:, None] < whole_width)
    across = fold.to(tl.float32)
    luma = luma - blueness - redness
    red, green, blue = 0.299 * luma + redness, 0.587 * luma, 0.114 * luma + blueness
    red = tl.dot(tl.dot(down, red, input_precision="ieee"), across, input_precision="ieee")
    green = tl.dot(tl.dot(down, green, input_precision="ieee"), across, input_precision="ieee")
    blue = tl.dot(tl.dot(down, blue, input_precision="ieee"), across, input_precision="ieee")
    _store_three(out_ptr, sample, row * width + column, size, inside, red, green, blue)


def _code(images: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Decoded luma and chroma."""
    batch, _, height, width = images.shape
    down, across = triton.cdiv(height, 32), triton.cdiv(width, 32)
    luma = torch.empty(batch, 32 * down, 32 * across, dtype=torch.float32, device=images.device)
    chroma = torch.empty(batch, 2, 16 * down, 16 * across, dtype=torch.float32, device=images.device)
    _code_kernel[(batch * down * across,)](
        luma, chroma, images, tables, height, width, height * width, down, across
    )
    return luma, chroma


def differentiable_jpeg(out: Tensor, images: Tensor, tables: Tensor, block: int = 1024) -> None:
    """Write the pictures into out; all dense."""
    batch, _, height, width = images.shape
    luma, chroma = _code(images, tables)
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
    luma, chroma = _code(images, tables)
    size = height * width
    blocks = triton.cdiv(size, block)
    pixels = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    _decoded_gradient_kernel[(batch * blocks,)](
        pixels, grad, luma, chroma, height, width, size, blocks, *luma.shape[1:], BLOCK=block
    )
    down, across = luma.shape[1] // 32, luma.shape[2] // 32
    _gradient_kernel[(batch * down * across,)](
        out, pixels, images, tables, height, width, size, down, across
    )
