"""Exact low-rank changes of a UNet as LoRA files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .files import new_file, write_tensors
from .original_layout import unet_layer

LoraFormat = Literal["diffusers", "kohya"]

_UP = {"diffusers": "lora_B", "kohya": "lora_up"}
_DOWN = {"diffusers": "lora_A", "kohya": "lora_down"}

# also as diffusers before 0.23 has them: X.lora.down, and attn2.processor.to_k_lora.down
_FACTOR = re.compile(r"(.+?)(?:\.lora_|\.lora\.|_lora\.)(A|B|down|up)\.weight")


def save_lora(
    path: str | PathLike[str],
    layers: Mapping[str, tuple[Tensor, Tensor]],
    unet: nn.Module,
    *,
    format: LoraFormat = "diffusers",
    metadata: Mapping[str, str] = {},
) -> None:
    """Write W' = W + up @ down as a LoRA file that other programs load at its full weight, 1.

    All layers have one rank in the file, the largest; factors of a smaller one are filled up with zeros.
    Readers of both formats take the alpha of some layers for that of all, and so would scale the others
    (diffusers does for attention in kohya's format, and before 0.42 in its own).

    Memory: one copy of what is written. Factors may share memory; the file has each layer's own.

    Args:
        path: ends in .safetensors; its folder is made.
        layers: (up (o, r), down (r, d)), floating, written in their dtypes, by the name of an nn.Linear of
            the UNet, such as "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"; r may differ by layer.
        unet: the UNet2DConditionModel that the change is of.
        format: "diffusers" for `load_lora_weights`; "kohya" for A1111, ComfyUI and diffusers, with the names
            of kohya's scripts: diffusers' own for Stable Diffusion 1 and 2, the original's for XL. diffusers
            0.42 reads all of them, `label_emb_0_0` (add_embedding.linear_1) with the others.
        metadata: added to the file's header.

    Raises:
        ValueError: for no layers, layers that the UNet does not have (as plain or quantised nn.Linear) or
            whose shapes do not fit, an unknown format, something at `path`, or one that cannot be written.
        TypeError: if a factor is not a floating tensor.
    """
    unet = getattr(unet, "_orig_mod", unet)
    if format not in get_args(LoraFormat):
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(get_args(LoraFormat))}")
    _check(layers, unet)
    keys = {name: _key(name, unet, format) for name in layers}
    path = new_file(path)
    rank = max(len(down) for _, down in layers.values())
    tensors = {}
    for name, (up, down) in layers.items():
        pad = rank - len(down)
        tensors[f"{keys[name]}.{_UP[format]}.weight"] = _copy(up, (0, pad))
        tensors[f"{keys[name]}.{_DOWN[format]}.weight"] = _copy(down, (0, 0, 0, pad))
        if format == "kohya":
            tensors[f"{keys[name]}.alpha"] = torch.tensor(float(rank))
    write_tensors(path, tensors, metadata)


def _check(layers: Mapping[str, tuple[Tensor, Tensor]], unet: nn.Module) -> None:
    if not layers:
        raise ValueError("layers: got none, expected at least one")
    modules = dict(unet.named_modules())
    for name, factors in layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            found = "nothing" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"layers: the UNet has {found} at {name!r}, expected an nn.Linear")
        if not all(isinstance(factor, Tensor) and factor.is_floating_point() for factor in factors):
            raise TypeError(f"layers: the factors of {name!r} are not floating tensors")
        up, down = (tuple(factor.shape) for factor in factors)
        rank = down[0] if down else 0
        if not rank or up != (module.out_features, rank) or down != (rank, module.in_features):
            raise ValueError(
                f"layers: {name!r} got up {up} and down {down}, "
                f"expected ({module.out_features}, r) and (r, {module.in_features})"
            )


def _key(name: str, unet: nn.Module, format: LoraFormat) -> str:
    if format == "diffusers":
        return f"unet.{name}"
    config: Any = unet.config
    original = unet_layer(name, config) if config.addition_embed_type == "text_time" else name
    if original is None:
        raise ValueError(f"layers: {name!r} has no place in the original layout")
    return f"lora_unet_{original.replace('.', '_')}"


def _copy(factor: Tensor, pad: tuple[int, ...]) -> Tensor:
    """On the CPU, contiguous, in memory of its own."""
    return nn.functional.pad(factor.detach(), pad).to("cpu").clone(memory_format=torch.contiguous_format)


def read_lora(path: str | PathLike[str], unet: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the LoRA of a UNet as factors of what it adds, W' = W + up @ down.

    ::

        up = alpha / r  lora_up        alpha / sqrt(r) where the header says that it is rank-stabilised

    Args:
        path: a .safetensors file in the layout of diffusers or of kohya's scripts.
        unet: the UNet2DConditionModel that it is for: kohya's names cannot be told without it.

    Returns:
        (up (o, r), down (r, d)) float32 on the CPU, by the name of the nn.Linear.

    Raises:
        ValueError: for a file that cannot be read or holds no LoRA, and for parts that are no LoRA of an
            nn.Linear of the UNet: text encoders, convolutions, DoRA.
    """
    unet = getattr(unet, "_orig_mod", unet)
    try:
        with safe_open(str(path), framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        layers, alphas = _parts(tensors, unet)
        _check(layers, unet)
        return {
            name: (up.float() * _scale(name, len(down), alphas, settings), down.float())
            for name, (up, down) in layers.items()
        }
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"path: {str(path)!r} cannot be read as a LoRA: {reason}") from error


def _parts(
    tensors: Mapping[str, Tensor], unet: nn.Module
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """The factors of each layer as they are written, and the alphas."""
    names = _names(unet)
    halves: dict[str, dict[str, Tensor]] = {}
    alphas = {}
    for key, tensor in tensors.items():
        factor = _FACTOR.fullmatch(key)
        end = key.removesuffix(".alpha") if factor is None else factor[1].replace(".processor.", ".")
        if end not in names or end == key:
            raise ValueError(f"its {key!r} is no LoRA of an nn.Linear of the UNet")
        if factor is None:
            alphas[names[end]] = float(tensor)
        else:
            halves.setdefault(names[end], {})["up" if factor[2] in ("B", "up") else "down"] = tensor
    missing = next((name for name, half in halves.items() if len(half) < 2), None)
    if missing is not None:
        raise ValueError(f"it has one of the two factors of {missing!r}")
    return {name: (half["up"], half["down"]) for name, half in halves.items()}, alphas


def _names(unet: nn.Module) -> dict[str, str]:
    """The linear layers by every name that a file may have for them."""
    config: Any = unet.config
    names: dict[str, str] = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear):
            original = unet_layer(name, config) if config.addition_embed_type == "text_time" else None
            flat = [f"lora_unet_{layer.replace('.', '_')}" for layer in (name, original) if layer]
            names |= dict.fromkeys((name, f"unet.{name}", *flat), name)
    return names


def _scale(name: str, rank: int, alphas: Mapping[str, float], settings: Mapping[str, Any]) -> float:
    """What the product of a layer's factors is multiplied by, told by the tensors or by diffusers' header."""
    patterns = settings.get("unet.alpha_pattern") or {}
    own = next((alpha for end, alpha in patterns.items() if f".{name}".endswith(f".{end}")), None)
    alpha = alphas.get(name, settings.get("unet.lora_alpha") if own is None else own)
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if settings.get("unet.use_rslora") else rank)
