"""What the tests of the ops share: how close a kernel must be, and the layouts that it must get right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pumice import ops

HALF = (torch.float16, torch.bfloat16)
STORAGE = (torch.float32, *HALF)


def assert_kernel_close(
    actual: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0, scale: float | None = None
) -> None:
    """No further from the float64 result than `factor` times what plain torch is, and two roundings.

    `scale` is the size of the terms that were rounded, where a sum of them cancels; else the result's own.
    """
    assert actual.shape == exact.shape
    assert torch.equal(actual.isnan(), exact.isnan()), "NaN elsewhere than in the reference"
    if actual.numel() == 0:
        return
    exact = exact.nan_to_num(0.0)
    error = (actual.double().nan_to_num(0.0) - exact).abs().max()
    plain_error = (plain.double().nan_to_num(0.0) - exact).abs().max()
    floor = 2 * torch.finfo(actual.dtype).eps * (scale or max(1.0, exact.abs().max().item()))
    allowed = factor * plain_error + floor
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, plain torch's {plain_error:.3g}"


def assert_magnitudes_close(
    actual: ops.GuidanceMagnitude, plain: ops.GuidanceMagnitude, exact: ops.GuidanceMagnitude, cond: Tensor
) -> None:
    positions = cond[0, 0].numel() if cond.numel() else 0
    terms = (exact.difference * exact.unconditional).nan_to_num(0.0)
    scales = {"dot": terms.max().item() if terms.numel() else 1.0, "cosine": float(positions)}
    for name, a, p, e in zip(actual._fields, actual, plain, exact, strict=True):
        assert a.dtype == torch.float32, name
        assert_kernel_close(a, p, e, scale=scales.get(name))


def layouts(make: Callable[..., Tensor], shape: tuple[int, int, int, int]) -> Iterator[tuple[str, Tensor]]:
    """The same kind of tensor, (B, C, H, W), in every layout that a user could hand over."""
    b, c, h, w = shape
    yield "contiguous", make(b, c, h, w)
    yield "channels_last", make(b, c, h, w).to(memory_format=torch.channels_last)
    yield "every second sample", make(2 * b, c, h, w)[::2]
    yield (
        "every second sample, channels_last",
        make(2 * b, c, h, w).to(memory_format=torch.channels_last)[::2],
    )
    yield "every second column", make(b, c, h, 2 * w)[..., ::2]
    yield "unaligned", make(b * c * h * w + 1)[1:].view(b, c, h, w)
    yield "transposed", make(b, c, w, h).transpose(2, 3)
    yield "batch inside", make(c, b, h, w).transpose(0, 1)
    yield "one sample expanded", make(1, c, h, w).expand(b, -1, -1, -1)
    yield "one channel expanded", make(b, 1, h, w).expand(-1, c, -1, -1)
