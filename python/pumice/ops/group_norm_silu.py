"""Group normalisation followed by SiLU: the pair that every ResNet block of a U-Net and a VAE runs twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pumice import _native
from pumice.ops import _layout
from pumice.ops._registry import DTYPES, register

# csrc/cpu/group_norm_silu.h keeps a number for each channel on the stack
_MOST_CHANNELS_LAST = 4096


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """`silu(group_norm(x))`: `torch.nn.GroupNorm` (Wu and He, 2018, arXiv:1803.08494), then `torch.nn.SiLU`.

    Over each sample's group of channels, with its mean and (biased) variance::

        n = (x - mean) / sqrt(var + eps)        z = weight * n + bias        y = z * sigmoid(z)

    The gradient, with dz = dy * (s + z s (1 - s)), s = sigmoid(z), and means over the group::

        dx = (weight * dz - mean(weight * dz) - n * mean(weight * dz * n)) / sqrt(var + eps)

    Sums are in float32 or better. Of the forward pass only x and the two statistics are kept.

    Args:
        x: (B, C, ...), float32, float16 or bfloat16 (float64: plain torch); contiguous or channels_last,
            other layouts are copied.
        groups: how many groups the channels are cut into.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.

    Returns:
        y, typed and laid out as x. Differentiable once in x, weight and bias; weight's and bias' gradients
        cost nothing where they are not asked for.

    A NaN in x makes its whole group NaN.

    Raises:
        TypeError: an argument of another dtype or kind.
        ValueError: channels that groups does not divide, shapes or devices that differ, a negative eps.
    """
    _layout.check_float("x", x)
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, C, ...)")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}; expected a divisor of the {channels} channels of x")
    for name, tensor in (("weight", weight), ("bias", bias)):
        _layout.check_float(name, tensor)
        if tensor.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected one number a channel, ({channels},)"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected at least 0")
    y: Tensor = torch.ops.pumice.group_norm_silu(x, weight, bias, groups, float(eps))[0]
    return y


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)."""
    exact = _exact(x.dtype)
    grouped = x.to(exact).reshape(x.shape[0], groups, -1)
    mean = grouped.mean(2)
    rstd = (grouped.var(2, correction=0) + eps).rsqrt()
    normal = ((grouped - mean[..., None]) * rstd[..., None]).view(x.shape)
    z = normal * _over(x, weight.to(exact)) + _over(x, bias.to(exact))
    return F.silu(z).to(x.dtype), mean, rstd


def reference_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); the last two empty unless `affine`."""
    exact = _exact(x.dtype)
    shape = (x.shape[0], groups, -1)
    normal = ((x.to(exact).reshape(shape) - mean[..., None]) * rstd[..., None]).view(x.shape)
    z = normal * _over(x, weight.to(exact)) + _over(x, bias.to(exact))
    s = z.sigmoid()
    dz = dy.to(exact) * (s + z * s * (1 - s))
    dn = (dz * _over(x, weight.to(exact))).reshape(shape)
    n = normal.reshape(shape)
    dx = rstd[..., None] * (dn - dn.mean(2, keepdim=True) - n * (dn * n).mean(2, keepdim=True))
    sums = torch.stack([dz.flatten(2).sum(2), (dz * normal).flatten(2).sum(2)], dim=1)
    return (dx.view(x.shape).to(x.dtype), *_affine(sums, weight, bias, affine))


def _affine(sums: Tensor, weight: Tensor, bias: Tensor, affine: bool) -> tuple[Tensor, Tensor]:
    """dweight and dbias from every sample's sums of dz and of dz * n, (B, 2, C)."""
    if not affine:
        return weight.new_empty(0), bias.new_empty(0)
    return sums[:, 1].sum(0).to(weight.dtype), sums[:, 0].sum(0).to(bias.dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _over(x: Tensor, per_channel: Tensor) -> Tensor:
    return per_channel.view(-1, *[1] * (x.dim() - 2))


def _torch(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = reference(x, *rest)
    return torch.empty_like(x).copy_(y), mean, rstd


def _torch_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = reference_backward(dy, x, *rest)
    return torch.empty_like(x).copy_(dx), dweight, dbias


def _fake(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], groups, dtype=_exact(x.dtype))
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    size = x.shape[1] if rest[-1] else 0
    return torch.empty_like(x), weight.new_empty(size), bias.new_empty(size)


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """x as a kernel takes it, (B, C, size) or (B, size, C) without gaps, and whether it is the latter."""
    if x.is_contiguous():
        return x, False
    last = x.movedim(1, -1)
    if last.is_contiguous() and x.shape[1] <= _MOST_CHANNELS_LAST:
        return x, True
    return x.contiguous(), False


def _match(tensor: Tensor, like: Tensor) -> Tensor:
    if _layout.strides_equal(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _common(
    x: Tensor, last: bool, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Any, ...]:
    """The arguments that both passes begin with."""
    batch, channels = x.shape[:2]
    return (
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        *(DTYPES[t.dtype] for t in (x, weight, bias)),
        batch,
        channels,
        x[0, 0].numel(),
        mean.shape[1],
        last,
    )


def _forward(launch: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x)
        mean = torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
        if x.numel() == 0:
            return y, mean.fill_(torch.nan), rstd.fill_(torch.nan)
        dense, last = _dense(x)
        into = y if _layout.strides_equal(y, dense) else torch.empty_like(dense)
        launch(into, dense, last, weight.contiguous(), bias.contiguous(), mean, rstd, eps)
        return y if into is y else y.copy_(into), mean, rstd

    return forward


def _backward(launch: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        rstd: Tensor,
        groups: int,
        affine: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx = torch.empty_like(x)
        sums = torch.empty(x.shape[0], 2, x.shape[1], dtype=torch.float32, device=x.device)
        if x.numel() == 0:
            return dx, *_affine(sums.zero_(), weight, bias, affine)
        dense, last = _dense(x)
        into = dx if _layout.strides_equal(dx, dense) else torch.empty_like(dense)
        dy = _match(dy.to(x.dtype), dense)
        launch(into, dy, dense, last, weight.contiguous(), bias.contiguous(), mean, rstd, sums)
        return dx if into is dx else dx.copy_(into), *_affine(sums, weight, bias, affine)

    return backward


def _native_forward(extension: str) -> Callable[..., None]:
    def launch(y: Tensor, x: Tensor, last: bool, *rest: Any) -> None:
        *tensors, eps = rest
        native = _native.extension(extension)
        common = _common(x, last, *tensors)
        size = native.group_norm_silu_workspace(*common[-5:])
        workspace = torch.empty(size, dtype=torch.float64, device=x.device)
        native.group_norm_silu(*common, y.data_ptr(), eps, workspace.data_ptr(), *_layout.execution(x))

    return launch


def _native_backward(extension: str) -> Callable[..., None]:
    def launch(dx: Tensor, dy: Tensor, x: Tensor, last: bool, *rest: Any) -> None:
        *tensors, sums = rest
        native = _native.extension(extension)
        common = _common(x, last, *tensors)
        size = native.group_norm_silu_backward_workspace(*common[-5:])
        workspace = torch.empty(size, dtype=torch.float32, device=x.device)
        pointers = (t.data_ptr() for t in (dy, dx, sums, workspace))
        native.group_norm_silu_backward(*common, *pointers, *_layout.execution(x))

    return launch


def _triton_forward(*args: Any) -> None:
    from pumice.triton_kernels.group_norm_silu import group_norm_silu as launch

    launch(*args)


def _triton_backward(*args: Any) -> None:
    from pumice.triton_kernels.group_norm_silu import group_norm_silu_backward as launch

    launch(*args)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, groups, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.groups = groups
    ctx.mark_non_differentiable(mean, rstd)


def _autograd(ctx: Any, dy: Tensor, _mean: Any, _rstd: Any) -> tuple[Any, ...]:
    affine = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dweight, dbias = torch.ops.pumice.group_norm_silu_backward(dy, *ctx.saved_tensors, ctx.groups, affine)
    wanted = ctx.needs_input_grad
    return dx if wanted[0] else None, dweight if wanted[1] else None, dbias if wanted[2] else None, None, None


register(
    "group_norm_silu",
    "(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    backends={
        "torch": _torch,
        "cpu": _forward(_native_forward("_cpu")),
        "cuda": _forward(_native_forward("_cuda")),
        "triton": _forward(_triton_forward),
    },
)
register(
    "group_norm_silu_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups, bool affine)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    backends={
        "torch": _torch_backward,
        "cpu": _backward(_native_backward("_cpu")),
        "cuda": _backward(_native_backward("_cuda")),
        "triton": _backward(_triton_backward),
    },
)
torch.library.register_autograd("pumice::group_norm_silu", _autograd, setup_context=_setup_context)
