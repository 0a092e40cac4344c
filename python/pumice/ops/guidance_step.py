"""One step of a guided sampler: classifier-free guidance, the prediction of x0 and the update in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pumice import _native
from pumice.ops import _layout
from pumice.ops._registry import DTYPES, register
from pumice.ops.guidance_magnitude import MOST_CHANNELS_LAST, GuidanceMagnitude, check_pair, from_sums
from pumice.ops.guidance_magnitude import reference as magnitude_sums

PredictionType = Literal["epsilon", "v_prediction", "flow"]
PREDICTIONS = ("epsilon", "v_prediction", "flow")  # the order of Prediction in csrc/math/guidance_step.h
COEFFICIENTS = ("alpha", "sigma", "x0", "eps", "x", "noise")


class GuidanceStep(NamedTuple):
    sample: Tensor
    """The new sample, typed and laid out as x."""
    magnitude: GuidanceMagnitude | None
    """Of the predictions as they came, where it was asked for."""


def guidance_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    guidance_scale: float | Tensor,
    coefficients: Tensor,
    noise: Tensor | None = None,
    *,
    prediction_type: PredictionType = "epsilon",
    clip_sample: float | None = None,
    magnitude: bool = False,
) -> GuidanceStep:
    """Guide (Ho and Salimans, 2022, arXiv:2207.12598), predict x0, and take a linear sampler's step.

    With the six columns of `coefficients`, named in `COEFFICIENTS`, alpha and sigma first, then k_x0,
    k_eps, k_x and k_noise::

        out = uncond + guidance_scale (cond - uncond)
        epsilon:       x0 = (x - sigma out) / alpha     eps = out
        v_prediction:  x0 = alpha x - sigma out         eps = alpha out + sigma x
        flow:          x0 = x - sigma out               eps = x + alpha out            (alpha = 1 - sigma)
        x0  = clamp(x0, -clip_sample, clip_sample)
        new = k_x0 x0 + k_eps eps + k_x x + k_noise noise

    where x = alpha x0 + sigma eps. With a' and s' for alpha and sigma of the next step, DDIM
    (arXiv:2010.02502) is ``(alpha, sigma, a', sqrt(s'^2 - s_t^2), 0, s_t)``, s_t the standard deviation of
    the noise it adds; DDPM's posterior (arXiv:2006.11239) has its two weights in k_x0 and k_x; Euler's step
    on a flow is ``(1 - sigma, sigma, 1 - s', s', 0, 0)``.

    Args:
        x: the current sample, (B, C, ...), float32, float16 or bfloat16; arithmetic is in float32.
        cond: the model's output with the prompt, shaped as x; its dtype may differ from x's.
        uncond: the output without, typed as cond, with its shape or a batch of 1.
        guidance_scale: a number, or a tensor (B,).
        coefficients: (6,) or (B, 6), float32, on the device of x: reading it there needs no host.
        noise: shaped and typed as x; None where k_noise is 0.
        prediction_type: what the model predicts.
        clip_sample: the largest |x0|, or None. eps is not recomputed from the clamped x0, as in diffusers'
            DDIM.
        magnitude: also return `guidance_magnitude(cond, uncond)`, from the same pass.

    Returns:
        A `GuidanceStep`. Differentiable, through the plain-torch reference.

    An alpha of 0 (a zero terminal SNR) has no x0 under epsilon prediction: the result is then not finite.

    Raises:
        TypeError: an argument of another dtype or kind.
        ValueError: shapes or devices that do not fit, an unknown prediction_type, a clip_sample that is not
            positive.
    """
    _layout.check_float("x", x)
    check_pair(cond, uncond)
    _layout.check_like("cond", cond, "x", x)
    if noise is not None:
        _layout.check_float("noise", noise, (x.dtype,))
        _layout.check_like("noise", noise, "x", x)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    _layout.check_float("coefficients", coefficients, (exact,))
    if coefficients.shape not in ((6,), (x.shape[0], 6)):
        shape = tuple(coefficients.shape)
        raise ValueError(
            f"coefficients has shape {shape}; expected (6,) or ({x.shape[0]}, 6): {COEFFICIENTS}"
        )
    if coefficients.device != x.device:
        raise ValueError(f"coefficients is on {coefficients.device}, x on {x.device}")
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type is {prediction_type!r}; expected one of {', '.join(PREDICTIONS)}")
    if clip_sample is not None and not clip_sample > 0:
        raise ValueError(f"clip_sample is {clip_sample}; expected a positive bound of |x0|, or None")
    scale, scales = _layout.number_or_per_sample("guidance_scale", guidance_scale, x)

    args = (
        x,
        cond,
        uncond,
        scale,
        scales,
        coefficients.view(-1, 6),
        noise,
        prediction_type,
        clip_sample,
        magnitude,
    )
    tensors = (x, cond, uncond, guidance_scale, coefficients, noise)
    wants_grad = any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
    step = reference if torch.is_grad_enabled() and wants_grad else torch.ops.pumice.guidance_step
    sample, sums = step(*args)
    return GuidanceStep(sample, from_sums(sums) if magnitude else None)


def reference(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    scale: float,
    scales: Tensor | None,
    coefficients: Tensor,
    noise: Tensor | None,
    prediction_type: str,
    clip_sample: float | None,
    magnitude: bool,
) -> tuple[Tensor, Tensor]:
    """(new sample, the sums of `guidance_magnitude` or an empty tensor)."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(exact)
    out = uncond.to(exact) + _layout.spread(scale, scales, wide) * (cond.to(exact) - uncond.to(exact))
    columns = (_layout.spread(0.0, column, wide) for column in coefficients.unbind(1))
    alpha, sigma, k_x0, k_eps, k_x, k_noise = columns
    if prediction_type == "epsilon":
        x0, eps = (wide - sigma * out) / alpha, out
    elif prediction_type == "v_prediction":
        x0, eps = alpha * wide - sigma * out, alpha * out + sigma * wide
    else:
        x0, eps = wide - sigma * out, wide + alpha * out
    if clip_sample is not None:
        x0 = x0.clamp(-clip_sample, clip_sample)
    new = k_x0 * x0 + k_eps * eps + k_x * wide
    if noise is not None:
        new = new + k_noise * noise.to(exact)
    sums = magnitude_sums(cond, uncond) if magnitude else x.new_empty(0, 4, dtype=exact)
    return new.to(x.dtype), sums


def _torch(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    sample, sums = reference(x, *rest)
    return torch.empty_like(x).copy_(sample), sums


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    magnitude = rest[-1]
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x), x.new_empty(x.shape[0] if magnitude else 0, 4, dtype=exact)


def _step(launch: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    def step(x: Tensor, cond: Tensor, uncond: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        scale, scales, coefficients, noise, prediction_type, clip_sample, magnitude = rest
        out, sums = _fake(x, magnitude)
        if x.numel() == 0:
            return out, sums.zero_()
        like, last = _layout.by_channel(x, MOST_CHANNELS_LAST)
        if like.dtype not in (
            cond.dtype,
            torch.float32,
        ):  # the kernels know x as the model's type or as float32
            like = like.float()
        into = (
            out
            if out.dtype == like.dtype and _layout.strides_equal(out, like, first=1)
            else torch.empty_like(like)
        )
        cond, uncond = _layout.arranged(cond, like), _layout.arranged(uncond, like)
        if noise is not None:
            noise = _layout.arranged(noise.to(like.dtype), like)
        shape = x.shape[0], x.shape[1], x[0, 0].numel()
        if not magnitude:  # only the magnitudes need to know the channels apart
            shape, last = (shape[0], 1, shape[1] * shape[2]), False
        clip = torch.inf if clip_sample is None else clip_sample
        kind = PREDICTIONS.index(prediction_type)
        limits = scale, scales, coefficients.contiguous(), kind, clip
        launch(into, like, cond, uncond, noise, sums if magnitude else None, *shape, last, *limits)
        return out if into is out else out.copy_(into), sums

    return step


def _native_step(extension: str) -> Callable[..., None]:
    def launch(
        out: Tensor,
        x: Tensor,
        cond: Tensor,
        uncond: Tensor,
        noise: Tensor | None,
        sums: Tensor | None,
        batch: int,
        channels: int,
        positions: int,
        last: bool,
        scale: float,
        scales: Tensor | None,
        coefficients: Tensor,
        kind: int,
        clip: float,
    ) -> None:
        native = _native.extension(extension)
        workspace = None
        if sums is not None:
            size = native.guidance_step_workspace(batch, channels, positions)
            workspace = torch.empty(size, dtype=torch.float64, device=x.device)
        tensors = out, x, cond, uncond, noise
        native.guidance_step(
            *(_layout.pointer(t) for t in tensors),
            DTYPES[x.dtype],
            DTYPES[cond.dtype],
            batch,
            channels,
            positions,
            last,
            *(0 if t is None else _layout.batch_stride(t) for t in tensors),
            scale,
            _layout.pointer(scales),
            coefficients.data_ptr(),
            _layout.batch_stride(coefficients),
            kind,
            clip,
            _layout.pointer(sums),
            _layout.pointer(workspace),
            *_layout.execution(x),
        )

    return launch


def _triton(*args: Any) -> None:
    from pumice.triton_kernels.guidance_step import guidance_step as launch

    launch(*args)


register(
    "guidance_step",
    "(Tensor x, Tensor cond, Tensor uncond, float scale, Tensor? scales, Tensor coefficients, Tensor? noise,"
    " str prediction_type, float? clip_sample, bool magnitude) -> (Tensor, Tensor)",
    fake=_fake,
    backends={
        "torch": _torch,
        "cpu": _step(_native_step("_cpu")),
        "cuda": _step(_native_step("_cuda")),
        "triton": _step(_triton),
    },
)
