"""Modules that keep only what the gradient in their input needs: nobody asks for that in their weights.

Autograd keeps the input of every convolution for the gradient in its weight, also where the weight is frozen,
and the input of every activation beside that of the normalisation before it. The forms here keep the input of
the normalisation and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from pumice import ops

_SMALL = 2**20  # values of a tensor that a CPU's cache holds


@contextmanager
def lean(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Swap the forward methods of what is in `modules` inside the block; frozen weights, eval mode.

    Convolutions keep no input, group normalisation and SiLU are one (`ops.group_norm_silu`), a gated GELU is
    computed again in the backward pass. Outputs and gradients are those of the modules up to rounding, once
    differentiable. Modules that somebody else changed (hooks, offloading, adapters) are left as they are.
    What is compiled runs as it is inside: it would be compiled again for every block.
    """
    forms: dict[nn.Module, Callable[..., Tensor]] = {}
    for module in modules:
        forms |= {part: form for part, form in _forms(module) if _untouched(part)}
    try:
        for module, form in forms.items():
            module.forward = form
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in forms:
            del module.forward  # the class has its own


def _forms(module: Any) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    kind = type(module)
    if kind is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        yield module, partial(_convolution, module)
    elif kind is GEGLU:
        yield module, partial(_geglu, module)
    elif kind is ResnetBlock2D and _is_silu(module.nonlinearity) and _untouched(module.norm1, module.norm2):
        yield module, partial(_resnet_block, module)
    elif hasattr(module, "conv_norm_out") and hasattr(module, "conv_act"):  # encoders, decoders and U-Nets
        norm, activation = module.conv_norm_out, module.conv_act
        if type(norm) is nn.GroupNorm and _is_silu(activation) and _untouched(norm, activation):
            yield norm, partial(_norm_silu, norm)
            yield activation, _identity


def _untouched(*modules: nn.Module) -> bool:
    return not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in modules)


def _is_silu(activation: Any) -> bool:
    return type(activation) is nn.SiLU


def _identity(x: Tensor) -> Tensor:
    return x


def _is_small(x: Tensor) -> bool:
    """Whether a call costs more time than it saves, and what is kept is little."""
    return x.device.type == "cpu" and x.numel() < _SMALL


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if _is_small(x):
        return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.how = x.shape[2:], how
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        sides = zip(ctx.size, dy.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        # pixels at the end that no stride reached
        rest = [size - (out - 1) * s + 2 * p - d * (k - 1) - 1 for size, out, k, s, p, d in sides]
        dx = F.conv_transpose2d(dy, weight, None, stride, padding, rest, groups, dilation)
        return dx, None, None, None, None, None, None


def _convolution(conv: Any, x: Tensor) -> Tensor:
    args = conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    needed = torch.is_grad_enabled() and x.requires_grad and not conv.weight.requires_grad
    if not needed or _is_small(x) or torch.is_autocast_enabled(x.device.type):
        return F.conv2d(x, *args)
    output: Tensor = _Convolution.apply(x, *args)  # type: ignore[no-untyped-call]
    return output


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        hidden, gate = x.chunk(2, dim=-1)
        return F.gelu(gate).mul_(hidden)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        hidden, gate = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        dhidden, dgate = dx.chunk(2, dim=-1)
        torch.mul(dy, F.gelu(gate), out=dhidden)
        dgate.copy_(torch.ops.aten.gelu_backward(dy * hidden, gate))
        return dx


def _geglu(module: GEGLU, hidden_states: Tensor) -> Tensor:
    x: Tensor = module.proj(hidden_states)
    if _is_small(x):
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)
    output: Tensor = _GatedGelu.apply(x)  # type: ignore[no-untyped-call]
    return output


def _resnet_block(block: Any, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
    """As the block's own forward, with both normalisations and their SiLUs fused."""
    hidden = _norm_silu(block.norm1, input_tensor)
    resample = block.upsample or block.downsample
    if resample is not None:
        input_tensor, hidden = resample(input_tensor), resample(hidden)
    hidden = block.conv1(hidden)
    if block.time_emb_proj is not None and temb is not None:
        temb = block.time_emb_proj(temb if block.skip_time_act else F.silu(temb))[:, :, None, None]
    if block.time_embedding_norm == "scale_shift" and temb is not None:
        scale, shift = temb.chunk(2, dim=1)
        hidden = F.silu(block.norm2(hidden) * (1 + scale) + shift)
    else:
        hidden = _norm_silu(block.norm2, hidden if temb is None else hidden + temb)
    hidden = block.conv2(hidden)
    if block.conv_shortcut is not None:
        input_tensor = block.conv_shortcut(input_tensor)
    output = input_tensor + hidden
    return output if block.output_scale_factor == 1 else output / block.output_scale_factor
