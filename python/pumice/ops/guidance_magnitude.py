"""How far, and in which direction, a prompt moves a model's prediction: what memorization detectors read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pumice import _native
from pumice.ops import _layout
from pumice.ops._registry import DTYPES, register

MOST_CHANNELS_LAST = 1024  # a run of csrc/cpu/tile.h holds all channels of a position


class GuidanceMagnitude(NamedTuple):
    """Of each sample, (B,), float32; with d = cond - uncond and u = uncond."""

    difference: Tensor
    """|d|: the text-conditional magnitude."""
    unconditional: Tensor
    """|u|."""
    dot: Tensor
    """Sum of d u."""
    cosine: Tensor
    """The cosine of d and u over the channels of a position, summed over the positions."""


def guidance_magnitude(cond: Tensor, uncond: Tensor) -> GuidanceMagnitude:
    """Per-sample norms of the guidance direction, in one pass and without reading anything back to the host.

    ::

        d = cond - uncond    |d| = sqrt(sum d^2)    |u| = sqrt(sum uncond^2)    dot = sum d uncond
        cosine = sum over positions p of  d_p . u_p / (max(|d_p|, 1e-8) max(|u_p|, 1e-8))

    |d| is the detection metric of Wen et al. (ICLR 2024, arXiv:2407.21720); the mean cosine, ``cosine``
    over the number of positions, is the anisotropy term of Asthana and Belagiannis (ICLR 2026,
    arXiv:2601.20642). Norms are per sample, never over the batch.

    Args:
        cond: the prediction with the prompt, (B, C, ...), float32, float16 or bfloat16; sums are in float32
            or better.
        uncond: the prediction without, typed as cond, with its shape or a batch of 1, which then serves all.

    Returns:
        A `GuidanceMagnitude`. Differentiable, through the plain-torch reference. A NaN makes its sample's
        sums NaN.

    Raises:
        TypeError: an argument of another dtype or kind.
        ValueError: shapes or devices that do not fit.
    """
    check_pair(cond, uncond)
    return from_sums(_sums(cond, uncond))


def check_pair(cond: Tensor, uncond: Tensor) -> None:
    _layout.check_float("cond", cond)
    _layout.check_float("uncond", uncond, (cond.dtype,))
    if cond.dim() < 2:
        raise ValueError(f"cond has shape {tuple(cond.shape)}; expected (B, C, ...)")
    if (
        uncond.dim() != cond.dim()
        or uncond.shape[1:] != cond.shape[1:]
        or uncond.shape[0] not in (1, cond.shape[0])
    ):
        raise ValueError(
            f"uncond has shape {tuple(uncond.shape)}; expected {tuple(cond.shape)} or a batch of 1"
        )
    if uncond.device != cond.device:
        raise ValueError(f"uncond is on {uncond.device}, cond on {cond.device}")


def from_sums(sums: Tensor) -> GuidanceMagnitude:
    """(B, 4) sums of d^2, u^2, d u and cosines, to norms."""
    dd, uu, du, cosines = sums.unbind(1)
    return GuidanceMagnitude(dd.sqrt(), uu.sqrt(), du, cosines)


def reference(cond: Tensor, uncond: Tensor) -> Tensor:
    """(B, 4): sums of d^2, u^2, d u, and of the positions' cosines."""
    exact = torch.float64 if cond.dtype == torch.float64 else torch.float32
    u = uncond.to(exact).expand_as(cond).flatten(2)
    d = cond.to(exact).flatten(2) - u
    cosines = torch.cosine_similarity(d, u, dim=1, eps=1e-8).sum(1)
    return torch.stack([(d * d).sum((1, 2)), (u * u).sum((1, 2)), (d * u).sum((1, 2)), cosines], dim=1)


def _sums(cond: Tensor, uncond: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (cond.requires_grad or uncond.requires_grad):
        return reference(cond, uncond)
    sums: Tensor = torch.ops.pumice.guidance_magnitude(cond, uncond)
    return sums


def _fake(cond: Tensor, uncond: Tensor) -> Tensor:
    return cond.new_empty(
        cond.shape[0], 4, dtype=torch.float64 if cond.dtype == torch.float64 else torch.float32
    )


def _native_sums(extension: str) -> Any:
    def sums(cond: Tensor, uncond: Tensor) -> Tensor:
        out = _fake(cond, uncond)
        if cond.numel() == 0:
            return out.zero_()
        native = _native.extension(extension)
        cond, last = _layout.by_channel(cond, MOST_CHANNELS_LAST)
        uncond = _layout.arranged(uncond, cond)
        sizes = cond.shape[0], cond.shape[1], cond[0, 0].numel()
        workspace = torch.empty(
            native.guidance_step_workspace(*sizes), dtype=torch.float64, device=cond.device
        )
        native.guidance_magnitude(
            out.data_ptr(),
            cond.data_ptr(),
            uncond.data_ptr(),
            DTYPES[cond.dtype],
            *sizes,
            last,
            _layout.batch_stride(cond),
            _layout.batch_stride(uncond),
            workspace.data_ptr(),
            *_layout.execution(cond),
        )
        return out

    return sums


def _triton(cond: Tensor, uncond: Tensor) -> Tensor:
    from pumice.triton_kernels.guidance_magnitude import guidance_magnitude as launch

    out = _fake(cond, uncond)
    if cond.numel() == 0:
        return out.zero_()
    cond, last = _layout.by_channel(cond, MOST_CHANNELS_LAST)
    launch(out, cond, _layout.arranged(uncond, cond), last)
    return out


register(
    "guidance_magnitude",
    "(Tensor cond, Tensor uncond) -> Tensor",
    fake=_fake,
    backends={
        "torch": reference,
        "cpu": _native_sums("_cpu"),
        "cuda": _native_sums("_cuda"),
        "triton": _triton,
    },
)
