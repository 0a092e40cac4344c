"""A low-rank edit of many weight matrices at once, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pumice import _native
from pumice.ops import _layout
from pumice.ops._registry import DTYPES, register

# On the CPU where it was measured (docs/ops.md), one pass over the weights is here still twice as fast
# as torch's two float32 products. But arithmetic, no longer memory, takes the time here, and beyond it a BLAS
# made for the machine is the better bet.
KERNEL_RANKS = 128


def low_rank_edit_(weights: Sequence[Tensor], up: Tensor, down: Tensor) -> None:
    """Edit weight matrices in place by one low-rank map of their inputs, in one pass over memory::

        W <- W + (W D) B        D = up, B = down

    This is the form of every closed-form edit of cross-attention (UCE, arXiv:2308.14761, and its kin): one D
    and one B serve the key and value projections of all layers.

    Args:
        weights: matrices (o, d), each with an o of its own; one dtype, float32, float16 or bfloat16 (or
            float64: plain torch). Their rows may lie apart, as in a slice of columns.
        up: (d, r), float32; float64 for float64 weights.
        down: (r, d), typed as up.

    Sums run in float32 from the weights as stored, and each result is rounded once. Rank 0 changes no bit. A
    NaN or an infinity spreads as in the formula: from a weight over its row. Above rank `KERNEL_RANKS` every
    backend is plain torch, two matrix products a layer. No gradient flows, also where a weight requires one.

    Raises:
        TypeError: an argument of another dtype or kind.
        ValueError: shapes or devices that differ, a weight that overlaps itself or comes twice.
    """
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a sequence of tensors, not {type(weights).__name__}")
    if not weights:
        return
    for i, weight in enumerate(weights):
        _check_weight(f"weights[{i}]", weight, weights[0])
    width = weights[0].shape[1]
    _check_factor("up", up, weights[0])
    if up.dim() != 2 or up.shape[0] != width:
        raise ValueError(f"up has shape {tuple(up.shape)}; expected (d, r) with d = {width} as the weights")
    _check_factor("down", down, weights[0])
    if down.shape != up.shape[::-1]:
        raise ValueError(f"down has shape {tuple(down.shape)}; expected {tuple(up.shape[::-1])}, (r, d)")
    torch.ops.pumice.low_rank_edit_([weight.detach() for weight in weights], up.detach(), down.detach())


def reference(weights: Sequence[Tensor], up: Tensor, down: Tensor) -> None:
    for weight in weights:
        exact = weight.to(up.dtype)  # the weight itself, unless it is stored in half
        exact.addmm_(exact @ up, down)
        if exact is not weight:
            weight.copy_(exact)


def _check_weight(name: str, weight: Tensor, first: Tensor) -> None:
    _layout.check_float(name, weight)
    if weight.dim() != 2 or weight.shape[1] != first.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; expected (o, d) with one d for all weights"
        )
    if weight.dtype != first.dtype:
        names = (str(t.dtype).removeprefix("torch.") for t in (weight, first))
        raise TypeError("{} is {}, weights[0] is {}; expected one dtype".format(name, *names))
    if weight.device != first.device:
        raise ValueError(f"{name} is on {weight.device}, weights[0] on {first.device}")
    reach = 0
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size > 1 and stride <= reach and weight.numel():
            raise ValueError(f"{name} overlaps itself; an edit in place needs memory of its own")
        reach += stride * (size - 1)


def _check_factor(name: str, factor: Tensor, weight: Tensor) -> None:
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    _layout.check_float(name, factor, (exact,))
    if factor.device != weight.device:
        raise ValueError(f"{name} is on {factor.device}, weights[0] on {weight.device}")


def _distinct(weights: Sequence[Tensor]) -> list[Tensor]:
    """Those that hold anything. Checked here, where tensors are real ones with addresses."""
    kept = [weight for weight in weights if weight.numel()]
    starts = {weight.data_ptr() for weight in kept}
    # slices of columns lie between each other and share nothing
    solid = sorted((weight.data_ptr(), weight.nbytes) for weight in kept if weight.is_contiguous())
    overlap = any(start + size > after for (start, size), (after, _) in pairwise(solid))
    if len(starts) < len(kept) or overlap:
        raise ValueError("weights share memory; expected each of them once")
    return kept


def _torch(weights: Sequence[Tensor], up: Tensor, down: Tensor) -> None:
    weights = _distinct(weights)
    if _identity(down):
        for weight in weights:
            exact = weight.to(up.dtype)
            weight.copy_(exact + exact @ up)
    elif up.shape[1]:
        reference(weights, up, down)


def _identity(down: Tensor) -> bool:
    """A map without low rank comes as U I; on a GPU a look would wait for it."""
    rank, width = down.shape
    return down.device.type == "cpu" and 0 < rank == width and torch.equal(down, torch.eye(rank).to(down))


def _kernel(edit: Callable[[list[Tensor], Tensor, Tensor], None]) -> Callable[..., None]:
    """A backend of `edit`, which takes dense rows at any distance, and D transposed: both factors (r, d)."""

    def run(weights: Sequence[Tensor], up: Tensor, down: Tensor) -> None:
        weights = _distinct(weights)
        if not weights or not 0 < up.shape[1] <= KERNEL_RANKS:
            return _torch(weights, up, down)
        dense = [weight if _dense_rows(weight) else weight.contiguous() for weight in weights]
        edit(dense, up.t().contiguous(), down.contiguous())
        for weight, edited in zip(weights, dense, strict=True):
            if edited is not weight:
                weight.copy_(edited)
            elif not weight.is_inference():
                torch.autograd.graph.increment_version(weight)  # autograd cannot see the write
        return None

    return run


def _dense_rows(weight: Tensor) -> bool:
    rows, columns = weight.shape
    return columns == 1 or (weight.stride(1) == 1 and (rows == 1 or weight.stride(0) >= columns))


def _native_edit(extension: str) -> Callable[[list[Tensor], Tensor, Tensor], None]:
    def edit(weights: list[Tensor], up: Tensor, down: Tensor) -> None:
        native = _native.extension(extension)
        rows = [weight.shape[0] for weight in weights]
        rank, columns = down.shape
        where = _layout.execution(down)
        size = native.low_rank_edit_workspace(rows, rank, *where)
        workspace = torch.empty(size, dtype=torch.float32, device=down.device)
        native.low_rank_edit(
            [weight.data_ptr() for weight in weights],
            rows,
            [weight.stride(0) for weight in weights],
            DTYPES[weights[0].dtype],
            columns,
            rank,
            *(tensor.data_ptr() for tensor in (up, down, workspace)),
            *where,
        )

    return edit


def _triton_edit(weights: list[Tensor], up: Tensor, down: Tensor) -> None:
    from pumice.triton_kernels.low_rank_edit import low_rank_edit as launch

    launch(weights, up, down)


register(
    "low_rank_edit_",
    "(Tensor(a!)[] weights, Tensor up, Tensor down) -> ()",
    fake=lambda *_: None,
    backends={
        "torch": _torch,
        "cpu": _kernel(_native_edit("_cpu")),
        "cuda": _kernel(_native_edit("_cuda")),
        "triton": _kernel(_triton_edit),
    },
)
