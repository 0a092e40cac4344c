"""How tensors are handed to kernels: as a batch of dense samples, by pointer and batch stride.

A kernel walks a sample's elements in the order they lie in memory, so all tensors of a call must share that
order; between samples any stride goes, also 0 for one sample that serves the whole batch.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from pumice import _native

CHECK_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_float(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...] = CHECK_DTYPES) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; expected {names}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {tensor.device}; expected cpu or cuda")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {other_name} has {tuple(other.shape)}")
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} on {other.device}")


def number_or_per_sample(name: str, value: float | Tensor, x: Tensor) -> tuple[float, Tensor | None]:
    """A float for every sample, or a tensor with one number a sample: (number, None) or (0.0, tensor)."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(
                f"{name} must be a number or a tensor of one a sample, not {type(value).__name__}"
            )
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; expected a finite number")
        return float(value), None
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected one number a sample, ({x.shape[0]},)"
        )
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, the samples on {x.device}")
    return 0.0, value.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


def spread(number: float, per_sample: Tensor | None, x: Tensor) -> float | Tensor:
    """The inverse for a reference: something that multiplies x sample by sample."""
    return number if per_sample is None else per_sample.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def strides_equal(a: Tensor, b: Tensor, first: int = 0) -> bool:
    pairs = zip(a.shape[first:], a.stride()[first:], b.stride()[first:], strict=True)
    return all(size == 1 or sa == sb for size, sa, sb in pairs)


def dense_samples(tensor: Tensor) -> bool:
    """Whether each sample fills one stretch of memory, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def arranged(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` itself where its samples lie as those of `like`, else a copy that does."""
    if strides_equal(tensor, like, first=1):
        return tensor
    return torch.empty_like(like[: tensor.shape[0]], dtype=tensor.dtype).copy_(tensor)


def batch_stride(tensor: Tensor) -> int:
    """Elements from a sample to the next; 0 where a single one serves the whole batch."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def execution(tensor: Tensor) -> tuple[int, int]:
    """Where a kernel runs: (threads, instruction level) on a CPU, (device index, stream) on a GPU."""
    if tensor.device.type == "cpu":
        return torch.get_num_threads(), _native.cpu_level()
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def by_channel(x: Tensor, most: int) -> tuple[Tensor, bool]:
    """x with samples stored as (C, ...) or, True, as (..., C), without gaps; a copy where it is neither.

    `most` is the number of channels that the kernels take in the second order.
    """
    sample = x[0]
    if sample.is_contiguous():
        return x, False
    if sample.movedim(0, -1).is_contiguous() and x.shape[1] <= most:
        return x, True
    return x.contiguous(), False
