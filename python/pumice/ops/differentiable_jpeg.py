"""JPEG with a gradient: what saving a picture and reading it again does to it."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pumice import _native
from pumice.ops import _layout
from pumice.ops._registry import DTYPES, register


def differentiable_jpeg(images: Tensor, quality: int | Tensor) -> Tensor:
    """Save pictures as JPEG and read them again, with a gradient.

    What libjpeg does at a quality, 4:2:0: YCbCr of the full range, chroma averaged over 2 x 2 pixels, the
    orthonormal DCT of 8 x 8 blocks divided by the tables of the standard (ITU-T T.81, annex K, scaled as
    libjpeg scales them), rounded, and all of that back, chroma interpolated by 3/4 and 1/4. Values between
    these steps are not rounded to 8 bit. The gradient of rounding is that of

    ::

        round(x) + (x - round(x))^3

    (Shin and Song, 2017), which says where a coefficient is about to be rounded to another level; that of
    the clamp to [0, 1] is 0 outside. Sums are in float32 or better; only the pictures are kept for the
    backward pass.

    Args:
        images: (B, 3, H, W) in [0, 1], float32, float16 or bfloat16 (float64: plain torch); sides that are
            no multiples of 16 are continued by their last pixels.
        quality: 1 to 100; one, or (B,). Or tables of one's own, (B, 2, 8, 8), luma's and chroma's, as
            `quantization_tables` makes them, above 0.

    Returns:
        (B, 3, H, W) in [0, 1], typed and laid out as images. Differentiable once in them.

    A NaN spreads over its macroblock of 16 x 16 pixels and to those beside it (Triton: over 32 x 32).

    Raises:
        TypeError: an argument of another dtype or kind.
        ValueError: for pictures of another shape, or a quality out of range (not checked on a GPU).
    """
    _layout.check_float("images", images)
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (B, 3, H, W)")
    tables = _tables(quality, images)
    out: Tensor = torch.ops.pumice.differentiable_jpeg(images, tables)
    return out


def quantization_tables(quality: Tensor) -> Tensor:
    """libjpeg's tables of luma and chroma at a quality (n,): (n, 2, 8, 8) float32, 1 to 255 each.

    ::

        clamp(floor((standard * s + 50) / 100), 1, 255)     s = floor(5000 / q) below 50, else 200 - 2 q
    """
    standard = torch.tensor((_LUMA, _CHROMA), dtype=torch.float32).to(quality.device, non_blocking=True)
    q = quality.float()
    scale = torch.where(q < 50, (5000 / q).floor(), 200 - 2 * q)
    tables: Tensor = ((standard.view(2, 8, 8) * scale[:, None, None, None] + 50) / 100).floor().clamp(1, 255)
    return tables


# ITU-T T.81, tables K.1 and K.2.
# fmt: off
_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)
_CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
)
# fmt: on


def reference(images: Tensor, tables: Tensor) -> Tensor:
    if images.numel() == 0:
        return torch.empty_like(images)
    values, _ = _coded(images, tables)
    return torch.empty_like(images).copy_(values.clamp(0, 1))


def reference_backward(grad: Tensor, images: Tensor, tables: Tensor) -> Tensor:
    """Every step's adjoint, from the last one to the first."""
    if images.numel() == 0:
        return torch.empty_like(images)
    values, (luma_levels, chroma_levels) = _coded(images, tables)
    height, width = images.shape[2:]
    grad = torch.where((values >= 0) & (values <= 1), grad.to(values.dtype), 0)
    red, green, blue = grad.unbind(1)
    green = green / 0.587
    red, blue = red - 0.299 * green, blue - 0.114 * green
    luma = (red + green + blue)[:, None]
    chroma = torch.stack((1.772 * blue, 1.402 * red), dim=1)
    chroma = _doubled_adjoint(_padded(chroma, 2))
    luma = _inverse_dct(_dct(_padded(luma, 16)) * _slope(luma_levels))
    chroma = _inverse_dct(_dct(_padded(chroma, 8)) * _slope(chroma_levels))
    luma = luma[:, 0]
    blueness, redness = (chroma / 4).repeat_interleave(2, 2).repeat_interleave(2, 3).unbind(1)
    blueness, redness = blueness / 1.772, redness / 1.402
    luma = luma - blueness - redness
    rgb = torch.stack((0.299 * luma + redness, 0.587 * luma, 0.114 * luma + blueness), dim=1)
    return torch.empty_like(images).copy_(_continued_adjoint(rgb, height, width))


def _coded(images: Tensor, tables: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The decoded pictures before they are clamped, and the coefficients of luma and chroma in levels."""
    exact = images if images.dtype == torch.float64 else images.float()
    height, width = images.shape[2:]
    red, green, blue = (_continued(exact, 16) * 255).unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue - 128
    blueness, redness = (blue - luma - 128) / 1.772, (red - luma - 128) / 1.402
    chroma = F.avg_pool2d(torch.stack((blueness, redness), dim=1), 2)
    tables = tables.to(exact.dtype)[:, :, None, None]
    luma_levels = _dct(luma[:, None]) / tables[:, :1]
    chroma_levels = _dct(chroma) / tables[:, 1:]
    luma = _inverse_dct(_rounded(luma_levels) * tables[:, :1])[:, 0, :height, :width]
    chroma = _inverse_dct(_rounded(chroma_levels) * tables[:, 1:])
    chroma = _doubled(chroma[:, :, : (height + 1) // 2, : (width + 1) // 2])
    blueness, redness = chroma[:, :, :height, :width].unbind(1)
    red, blue = luma + 1.402 * redness, luma + 1.772 * blueness
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return (torch.stack((red, green, blue), dim=1) + 128) / 255, (luma_levels, chroma_levels)


def _dct_matrix(like: Tensor) -> Tensor:
    index = torch.arange(8, dtype=torch.float64, device=like.device)
    matrix = torch.cos(torch.pi / 8 * (index + 0.5) * index[:, None]) / 2
    return torch.where(index[:, None] == 0, 8**-0.5, matrix).to(like.dtype)


def _dct(planes: Tensor) -> Tensor:
    """Of planes (n, c, H, W) by blocks: (n, c, H / 8, W / 8, 8, 8). Its inverse is its adjoint."""
    blocks = planes.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    dct = _dct_matrix(planes)
    return dct @ blocks @ dct.T


def _inverse_dct(levels: Tensor) -> Tensor:
    dct = _dct_matrix(levels)
    return (dct.T @ levels @ dct).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _rounded(x: Tensor) -> Tensor:
    whole = x.detach().round()
    bend = (x - whole) ** 3
    return whole + (bend - bend.detach())


def _slope(x: Tensor) -> Tensor:
    """Of `_rounded`."""
    return 3 * (x - x.round()).square()


def _continued(images: Tensor, multiple: int) -> Tensor:
    """The last row and column repeated until both sides are multiples."""
    for dim in (2, 3):
        missing = -images.shape[dim] % multiple
        edge = images.narrow(dim, images.shape[dim] - 1, 1)
        images = torch.cat((images, *[edge] * missing), dim=dim)
    return images


def _continued_adjoint(gradient: Tensor, height: int, width: int) -> Tensor:
    for dim, size in ((2, height), (3, width)):
        inner = gradient.narrow(dim, 0, size - 1)
        edge = gradient.narrow(dim, size - 1, gradient.shape[dim] - size + 1)
        gradient = torch.cat((inner, edge.sum(dim, keepdim=True)), dim=dim)
    return gradient


def _padded(gradient: Tensor, multiple: int) -> Tensor:
    """Zeros, where values were cut off, until both sides are multiples."""
    return F.pad(gradient, (0, -gradient.shape[3] % multiple, 0, -gradient.shape[2] % multiple))


def _doubled(planes: Tensor) -> Tensor:
    """Twice the size by weights of 3/4 and 1/4, libjpeg's "fancy upsampling"."""
    for dim in (2, 3):
        first, last = planes.narrow(dim, 0, 1), planes.narrow(dim, planes.shape[dim] - 1, 1)
        wide = torch.cat((first, planes, last), dim=dim)
        before, after = (wide.narrow(dim, start, planes.shape[dim]) for start in (0, 2))
        planes = torch.stack(((3 * planes + before) / 4, (3 * planes + after) / 4), dim=dim + 1)
        planes = planes.flatten(dim, dim + 1)
    return planes


def _doubled_adjoint(gradient: Tensor) -> Tensor:
    for dim in (3, 2):
        first, last = gradient.narrow(dim, 0, 1), gradient.narrow(dim, gradient.shape[dim] - 1, 1)
        even, odd = gradient.unflatten(dim, (-1, 2)).unbind(dim + 1)
        size = even.shape[dim] - 1
        before = torch.cat((first, odd.narrow(dim, 0, size)), dim)
        after = torch.cat((even.narrow(dim, 1, size), last), dim)
        gradient = (3 * (even + odd) + before + after) / 4
    return gradient


def _tables(quality: int | Tensor, images: Tensor) -> Tensor:
    batch = images.shape[0]
    if not isinstance(quality, Tensor):
        if isinstance(quality, bool) or not isinstance(quality, Integral):
            raise TypeError(f"quality: got {quality!r}, expected a whole number or a tensor")
        if not 1 <= quality <= 100:
            raise ValueError(f"quality: got {quality}, expected 1 to 100")
        return quantization_tables(torch.full((batch,), int(quality), device=images.device))
    if quality.is_complex():
        raise TypeError(f"quality: got {quality.dtype}, expected real numbers")
    # a fake tensor has no values, and a GPU would have to be waited for
    plain = type(quality) is Tensor and quality.device.type == "cpu"
    readable = plain and not torch.compiler.is_compiling()
    if quality.shape == (batch, 2, 8, 8):
        if quality.device != images.device:
            raise ValueError(f"quality: got tables on {quality.device}, expected {images.device}")
        if readable and not bool((quality > 0).all()):
            raise ValueError("quality: got tables with values that are not above 0, expected steps of levels")
        return quality.detach().to(torch.float32).contiguous()
    if quality.shape not in ((), (batch,)):
        raise ValueError(
            f"quality: got shape {tuple(quality.shape)}, expected (), ({batch},) or ({batch}, 2, 8, 8)"
        )
    if readable and not bool(((quality >= 1) & (quality <= 100)).all()):
        raise ValueError(f"quality: got {quality.tolist()}, expected 1 to 100")
    return quantization_tables(quality.expand(batch).to(images.device))


def _run(launch: Callable[..., None], images: Tensor, tables: Tensor, grad: Tensor | None = None) -> Tensor:
    out = torch.empty_like(images)
    if images.numel() == 0:
        return out
    dense = images.contiguous()
    into = out if out.is_contiguous() else torch.empty_like(dense)
    launch(into, dense, tables.contiguous(), *(() if grad is None else (grad.to(images.dtype).contiguous(),)))
    return out if into is out else out.copy_(into)


def _launch_native(extension: str) -> Callable[..., None]:
    def launch(out: Tensor, images: Tensor, tables: Tensor, grad: Tensor | None = None) -> None:
        native = _native.extension(extension)
        batch, _, height, width = images.shape
        size = native.differentiable_jpeg_workspace(batch, height, width)
        workspace = torch.empty(size, dtype=torch.float32, device=images.device)
        native.differentiable_jpeg(
            out.data_ptr(),
            images.data_ptr(),
            _layout.pointer(grad),
            tables.data_ptr(),
            DTYPES[images.dtype],
            batch,
            height,
            width,
            workspace.data_ptr(),
            *_layout.execution(images),
        )

    return launch


def _launch_triton(out: Tensor, images: Tensor, tables: Tensor, grad: Tensor | None = None) -> None:
    from pumice.triton_kernels import differentiable_jpeg as kernels

    if grad is None:
        kernels.differentiable_jpeg(out, images, tables)
    else:
        kernels.differentiable_jpeg_backward(out, grad, images, tables)


def _forward(launch: Callable[..., None]) -> Callable[..., Tensor]:
    return lambda images, tables: _run(launch, images, tables)


def _backward(launch: Callable[..., None]) -> Callable[..., Tensor]:
    return lambda grad, images, tables: _run(launch, images, tables, grad)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.pumice.differentiable_jpeg_backward(grad, *ctx.saved_tensors), None


_LAUNCHES = {"cpu": _launch_native("_cpu"), "cuda": _launch_native("_cuda"), "triton": _launch_triton}

register(
    "differentiable_jpeg",
    "(Tensor images, Tensor tables) -> Tensor",
    fake=lambda images, tables: torch.empty_like(images),
    backends={"torch": reference} | {name: _forward(launch) for name, launch in _LAUNCHES.items()},
)
register(
    "differentiable_jpeg_backward",
    "(Tensor grad, Tensor images, Tensor tables) -> Tensor",
    fake=lambda grad, images, tables: torch.empty_like(images),
    backends={"torch": reference_backward} | {name: _backward(launch) for name, launch in _LAUNCHES.items()},
)
torch.library.register_autograd("pumice::differentiable_jpeg", _autograd, setup_context=_setup_context)
