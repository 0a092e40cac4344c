"""Weighted sums down the rows and across the columns of pictures: blurs, means over boxes, other sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pumice import _native
from pumice.ops import _layout, _window
from pumice.ops._registry import register

LONGEST = 2**24  # of a side: places travel beside their weights, and up to here float32 has them all


def separable_sum(
    images: Tensor, row_places: Tensor, row_weights: Tensor, column_places: Tensor, column_weights: Tensor
) -> Tensor:
    """Sum pictures by weights that are a product of one for the row and one for the column.

    ::

        out[b, c, y, x] = sum_jk row_weights[y, j] column_weights[x, k]
                                 images[b, c, row_places[y, j], column_places[x, k]]

    Any linear filter along the sides is one of these, whatever it does at the borders and whatever size its
    result has. The gradient of images flows through, none of the weights. On a GPU it is plain torch.

    Args:
        images: (B, C, H, W), float32, float16 or bfloat16, of any range (or float64: plain torch).
        row_places: (h, j) int64, 0 to H - 1; a place that is not needed has weight 0.
        row_weights: (h, j), floating; rounded to float32 where images are not float64.
        column_places, column_weights: (w, k), the same of the columns.

    Returns:
        (B, C, h, w), typed as images, without gaps. Sums are in float32, rounded once.

    Raises:
        TypeError: an argument of another dtype or kind.
        ValueError: images that are not (B, C, H, W), sides of more than 2^24, places and weights of different
            shapes or places outside of the picture (not looked for on a GPU or while compiling).
    """
    _window.check_images(images)
    rows = _taps("row", row_places, row_weights, images.shape[2], images)
    columns = _taps("column", column_places, column_weights, images.shape[3], images)
    out: Tensor = torch.ops.pumice.separable_sum(images, rows, columns)
    return out


def reference(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Taps are (n, 2, k): places, and weights. A bag of embeddings is a weighted sum of rows that is fast
    everywhere; plane by plane all stays in the cache."""
    out = images.new_empty(_shape(images, rows, columns))
    for plane, to in zip(images.flatten(0, 1), out.flatten(0, 1), strict=True):
        to.copy_(_summed(_summed(plane.to(rows.dtype), rows).t(), columns).t())
    return out


def reference_backward(grad: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    back = _matrix(rows, height).t() @ grad.to(rows.dtype) @ _matrix(columns, width)
    return back.to(grad.dtype)


def _matrix(taps: Tensor, side: int) -> Tensor:
    """(n, side): the weights at their places."""
    places, weights = taps.unbind(1)
    line = torch.arange(taps.shape[0], device=taps.device)[:, None].expand_as(places)
    matrix = taps.new_zeros(taps.shape[0], side)
    return matrix.index_put((line, places.long()), weights, accumulate=True)


def _summed(plane: Tensor, taps: Tensor) -> Tensor:
    """(side, m) to (n, m)."""
    places, weights = taps.unbind(1)
    return embedding_bag(
        places.long(), plane.contiguous(), per_sample_weights=weights.contiguous(), mode="sum"
    )


def _taps(name: str, places: Tensor, weights: Tensor, side: int, images: Tensor) -> Tensor:
    """(n, 2, k) in the dtype that sums are in, on the device of the pictures."""
    for kind, tensor in (("places", places), ("weights", weights)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}_{kind}: got a {type(tensor).__name__}, expected a tensor")
    if places.dtype != torch.int64:
        raise TypeError(f"{name}_places: got {places.dtype}, expected torch.int64")
    if not weights.is_floating_point():
        raise TypeError(f"{name}_weights: got {weights.dtype}, expected a floating tensor")
    if places.dim() != 2 or places.shape != weights.shape:
        shapes = f"{tuple(places.shape)} and {tuple(weights.shape)}"
        raise ValueError(f"{name}_places, {name}_weights: got shapes {shapes}, expected (n, k) of both")
    if side > LONGEST:
        raise ValueError(f"images: got a side of {side}, expected at most 2^24")
    if places.numel() and places.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(each) for each in places.aminmax())
        if low < 0 or high >= side:
            raise ValueError(f"{name}_places: got {low} to {high}, expected 0 to {side - 1}")
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    return torch.stack((places.to(dtype), weights.detach().to(dtype)), dim=1).to(images.device)


def _shape(images: Tensor, rows: Tensor, columns: Tensor) -> tuple[int, ...]:
    return *images.shape[:2], rows.shape[0], columns.shape[0]


def _native_sum(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    out = images.new_empty(_shape(images, rows, columns))
    if out.numel() == 0 or images.numel() == 0:
        return out.zero_()
    planes = images.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    into = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    native = _native.extension("_cpu")
    threads, level = _layout.execution(images)
    workspace = torch.empty(native.separable_sum_workspace(images.shape[3], threads), dtype=torch.float32)
    native.separable_sum(
        into.data_ptr(),
        planes.data_ptr(),
        images.shape[0] * images.shape[1],
        *images.shape[2:],
        rows.contiguous().data_ptr(),
        rows.shape[0],
        rows.shape[2],
        columns.contiguous().data_ptr(),
        columns.shape[0],
        columns.shape[2],
        workspace.data_ptr(),
        threads,
        level,
    )
    return out if into is out else out.copy_(into)


def _native_backward(grad: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    return _native_sum(grad, _transposed(rows, height), _transposed(columns, width))


def _transposed(taps: Tensor, side: int) -> Tensor:
    """Taps (side, 2, k) that bring sums back to their places; k is what the busiest place needs."""
    places, weights = taps.unbind(1)
    line, term = weights.nonzero(as_tuple=True)
    place, order = places[line, term].long().sort()
    counts = place.bincount(minlength=side)
    slot = torch.arange(len(place)) - (counts.cumsum(0) - counts)[place]
    found = taps.new_zeros(side, 2, max(1, int(counts.max())))
    found[place, 0, slot] = line[order].to(taps.dtype)
    found[place, 1, slot] = weights[line, term][order]
    return found


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    images, rows, columns = inputs
    ctx.save_for_backward(rows, columns)
    ctx.sides = images.shape[2:]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.pumice.separable_sum_backward(grad, *ctx.saved_tensors, *ctx.sides), None, None


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.pumice.separable_sum(grad, *ctx.saved_tensors), None, None, None, None


register(
    "separable_sum",
    "(Tensor images, Tensor rows, Tensor columns) -> Tensor",
    fake=lambda images, rows, columns: images.new_empty(_shape(images, rows, columns)),
    backends={"torch": reference, "cpu": _native_sum},
)
register(
    "separable_sum_backward",
    "(Tensor grad, Tensor rows, Tensor columns, SymInt height, SymInt width) -> Tensor",
    fake=lambda grad, rows, columns, height, width: grad.new_empty((*grad.shape[:2], height, width)),
    backends={"torch": reference_backward, "cpu": _native_backward},
)
torch.library.register_autograd("pumice::separable_sum", _autograd, setup_context=_setup_context)
torch.library.register_autograd(
    "pumice::separable_sum_backward", _autograd_backward, setup_context=_setup_context_backward
)
