"""The layers through which text reaches the picture, and whether their weights may be edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .errors import UnsupportedModelError

_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


@dataclass(frozen=True, eq=False)
class CrossAttentionLayer:
    """One cross-attention layer of the denoiser, by its name in the denoiser's state dict."""

    name: str
    module: nn.Module

    @property
    def to_k(self) -> nn.Linear:
        return self.module.to_k  # type: ignore[return-value]

    @property
    def to_v(self) -> nn.Linear:
        return self.module.to_v  # type: ignore[return-value]

    @property
    def heads(self) -> int:
        return self.module.heads  # type: ignore[return-value]


def cross_attention_layers(unet: nn.Module) -> Mapping[str, CrossAttentionLayer]:
    """The cross-attention layers by name, in the order in which they run: down, mid, up."""
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile wraps it, and would change the names
    names = [name for name, module in unet.named_modules() if getattr(module, "is_cross_attention", False)]
    names.sort(key=lambda name: _ORDER[name.split(".", 1)[0]])  # stable: inside a block they are in order
    return {name: CrossAttentionLayer(name, unet.get_submodule(name)) for name in names}


def check_editable(layer: CrossAttentionLayer) -> None:
    """Raise UnsupportedModelError unless to_k and to_v are plain linears that the forward pass reads."""
    # the processor decides; diffusers' unfuse_qkv_projections leaves module.fused_projections set
    if type(layer.module.processor).__name__.startswith("Fused"):
        raise UnsupportedModelError(
            f"{layer.name}: its projections are fused, to_k and to_v are no longer read; "
            "call unfuse_qkv_projections() first"
        )
    for name, linear in (("to_k", layer.to_k), ("to_v", layer.to_v)):
        check_plain(f"{layer.name}.{name}", linear)


def check_plain(name: str, linear: nn.Module) -> None:
    """Raise UnsupportedModelError unless the layer `name` computes with the very weight that it shows."""
    reason = _not_plain(linear)
    if reason:
        raise UnsupportedModelError(f"{name}: {reason}")


def _not_plain(linear: nn.Module) -> str | None:
    if hasattr(linear, "base_layer"):
        return "a LoRA adapter is attached; call unload_lora_weights() first"
    if isinstance(linear, nn.Linear) and type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__} (quantised or wrapped), expected a plain nn.Linear"
    for weight in linear.parameters(recurse=False):
        if weight.is_meta:
            return "its weight is offloaded (meta device); remove the offload hooks first"
        kind = type(weight.data)
        if kind is not torch.Tensor or not weight.is_floating_point() or weight.element_size() < 2:
            return f"its weight is a {weight.dtype} {kind.__name__}, expected float16 or wider"
    return None
