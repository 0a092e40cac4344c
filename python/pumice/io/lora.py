"""Exact low-rank changes of a UNet and its text encoders as LoRA files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
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
_TEXT = ("text_encoder", "text_encoder_2")

# also as diffusers before 0.23 has them: X.lora.down, attn2.processor.to_k_lora.down and, of text encoders,
# q_proj.lora_linear_layer.down
_FACTOR = re.compile(r"(.+?)(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(A|B|down|up)\.weight")


def save_lora(
    path: str | PathLike[str],
    layers: Mapping[str, tuple[Tensor, Tensor]],
    unet: nn.Module,
    *,
    text_encoders: Sequence[nn.Module] = (),
    format: LoraFormat = "diffusers",
    metadata: Mapping[str, str] = {},
) -> None:
    """Write W' = W + up @ down as a LoRA file that other programs load at its full weight, 1.

    All layers have one rank in the file, the largest; factors of a smaller one are filled up with zeros.
    Readers of both formats take the alpha of some layers for that of all, and so would scale the others
    (diffusers does for attention in kohya's format, and before 0.42 in its own). And diffusers misses what
    changes in a text encoder of which no output projection of attention does: one of zeros is then added.

    Memory: one copy of what is written. Factors may share memory; the file has each layer's own.

    Args:
        path: ends in .safetensors; its folder is made.
        layers: (up (o, r), down (r, d)), floating, written in their dtypes, by the name of an nn.Linear of
            the UNet, such as "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", or of an nn.Conv2d, d
            being its input channels times the area of its kernel; those of text encoders stand behind
            "text_encoder." and "text_encoder_2."; r may differ by layer.
        unet: the UNet2DConditionModel that the change is of.
        text_encoders: those that layers are of, in the pipeline's order.
        format: "diffusers" for `load_lora_weights`; "kohya" for A1111, ComfyUI and diffusers, with the names
            of kohya's scripts: diffusers' own for Stable Diffusion 1 and 2, the original's for XL. diffusers
            0.42 reads all of them, `label_emb_0_0` (add_embedding.linear_1) with the others.
        metadata: added to the file's header.

    Raises:
        ValueError: for no layers, layers that the networks do not have (as plain or quantised nn.Linear, or
            as nn.Conv2d) or whose shapes do not fit, an unknown format, something at `path`, or one that
            cannot be written.
        TypeError: if a factor is not a floating tensor.
    """
    unet = getattr(unet, "_orig_mod", unet)
    if format not in get_args(LoraFormat):
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(get_args(LoraFormat))}")
    modules = _modules(unet, text_encoders)
    _check(layers, modules)
    layers = {**layers, **_output_projections(layers, modules)}
    keys = {name: _key(name, unet, format) for name in layers}
    path = new_file(path)
    rank = max(len(down) for _, down in layers.values())
    tensors = {}
    for name, (up, down) in layers.items():
        pad, module = rank - len(down), modules[name]
        up, down = _copy(up, (0, pad)), _copy(down, (0, 0, 0, pad))
        if isinstance(module, nn.Conv2d):
            up, down = up[:, :, None, None], down.unflatten(1, module.weight.shape[1:])
        tensors[f"{keys[name]}.{_UP[format]}.weight"] = up
        tensors[f"{keys[name]}.{_DOWN[format]}.weight"] = down
        if format == "kohya":
            tensors[f"{keys[name]}.alpha"] = torch.tensor(float(rank))
    write_tensors(path, tensors, metadata)


def _modules(unet: nn.Module, text_encoders: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """All modules by the names of their layers."""
    found = dict(unet.named_modules())
    for network, encoder in zip(_TEXT, text_encoders, strict=False):
        found |= {f"{network}.{name}": module for name, module in encoder.named_modules()}
    return found


def _network(name: str) -> tuple[str, str]:
    """Which network a layer is of, and what files call it there.

    transformers has the layers of some text encoders with and of some without "text_model.", files with it.
    """
    network, _, path = name.partition(".")
    if network not in _TEXT:
        return "unet", name
    return network, path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def _shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(o, d) of what can have a LoRA."""
    if isinstance(module, nn.Linear):  # whose weight may be packed
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)
    return None


def _check(layers: Mapping[str, tuple[Tensor, Tensor]], modules: Mapping[str, nn.Module]) -> None:
    if not layers:
        raise ValueError("layers: got none, expected at least one")
    for name, factors in layers.items():
        module = modules.get(name)
        shape = _shape(module)
        if shape is None:
            network = "the UNet" if _network(name)[0] == "unet" else "the model"
            found = "nothing" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"layers: {network} has {found} at {name!r}, expected an nn.Linear or nn.Conv2d")
        if not all(isinstance(factor, Tensor) and factor.is_floating_point() for factor in factors):
            raise TypeError(f"layers: the factors of {name!r} are not floating tensors")
        up, down = (tuple(factor.shape) for factor in factors)
        rank = down[0] if down else 0
        if not rank or up != (shape[0], rank) or down != (rank, shape[1]):
            raise ValueError(
                f"layers: {name!r} got up {up} and down {down}, expected ({shape[0]}, r) and (r, {shape[1]})"
            )


def _output_projections(
    layers: Mapping[str, tuple[Tensor, Tensor]], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRAs of zeros, of text encoders that change, but of which no output projection does."""
    found = {}
    for network in _TEXT:
        own = [name for name in layers if name.startswith(f"{network}.")]
        if own and not any(name.endswith(".out_proj") for name in own):
            every = (name for name in modules if name.startswith(f"{network}."))
            name = next(name for name in every if name.endswith(".self_attn.out_proj"))
            out, inner = _shape(modules[name]) or (0, 0)
            like = layers[own[0]][0]
            found[name] = like.new_zeros(out, 1), like.new_zeros(1, inner)
    return found


def _key(name: str, unet: nn.Module, format: LoraFormat) -> str:
    network, path = _network(name)
    if format == "diffusers":
        return f"{network}.{path}"
    config: Any = unet.config
    original = config.addition_embed_type == "text_time"
    if network != "unet":
        number = str(_TEXT.index(network) + 1) if original else ""
        return f"lora_te{number}_{path.replace('.', '_')}"
    found = unet_layer(path, config) if original else path
    if found is None:
        raise ValueError(f"layers: {name!r} has no place in the original layout")
    return f"lora_unet_{found.replace('.', '_')}"


def _copy(factor: Tensor, pad: tuple[int, ...]) -> Tensor:
    """On the CPU, contiguous, in memory of its own."""
    return nn.functional.pad(factor.detach(), pad).to("cpu").clone(memory_format=torch.contiguous_format)


def read_lora(
    path: str | PathLike[str], unet: nn.Module, *, text_encoders: Sequence[nn.Module] = ()
) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the LoRA of a UNet, and of text encoders, as factors of what it adds, W' = W + up @ down.

    ::

        up = alpha / r  lora_up        alpha / sqrt(r) where the header says that it is rank-stabilised

    Args:
        path: a .safetensors file in the layout of diffusers or of kohya's scripts.
        unet: the UNet2DConditionModel that it is for: kohya's names cannot be told without it.
        text_encoders: that it may be for, too, in the pipeline's order.

    Returns:
        (up (o, r), down (r, d)) float32 on the CPU, by the names that `save_lora` takes; of a convolution d
        is its input channels times the area of its kernel.

    Raises:
        ValueError: for a file that cannot be read or holds no LoRA, and for parts that are no LoRA of an
            nn.Linear or nn.Conv2d of these networks, such as DoRA.
    """
    unet = getattr(unet, "_orig_mod", unet)
    try:
        with safe_open(str(path), framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        modules = _modules(unet, text_encoders)
        layers, alphas = _parts(tensors, unet, modules)
        _check(layers, modules)
        return {
            name: (up.float() * _scale(name, len(down), alphas, settings), down.float())
            for name, (up, down) in layers.items()
        }
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"path: {str(path)!r} cannot be read as a LoRA: {reason}") from error


def _parts(
    tensors: Mapping[str, Tensor], unet: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """The factors of each layer as matrices, otherwise as they are written, and the alphas."""
    names = _names(unet, modules)
    halves: dict[str, dict[str, Tensor]] = {}
    alphas = {}
    for key, tensor in tensors.items():
        factor = _FACTOR.fullmatch(key)
        end = key.removesuffix(".alpha") if factor is None else factor[1].replace(".processor.", ".")
        if end not in names or end == key:
            raise ValueError(f"its {key!r} is no LoRA of a linear layer or convolution of the model")
        if factor is None:
            alphas[names[end]] = float(tensor)
        else:
            matrix = tensor.flatten(1) if tensor.ndim == 4 else tensor
            halves.setdefault(names[end], {})["up" if factor[2] in ("B", "up") else "down"] = matrix
    missing = next((name for name, half in halves.items() if len(half) < 2), None)
    if missing is not None:
        raise ValueError(f"it has one of the two factors of {missing!r}")
    return {name: (half["up"], half["down"]) for name, half in halves.items()}, alphas


def _names(unet: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The layers by every name that a file may have for them."""
    config: Any = unet.config
    names: dict[str, str] = {}
    for name, module in modules.items():
        if _shape(module) is None:
            continue
        network, path = _network(name)
        every = [name]
        if network == "unet":
            original = unet_layer(name, config) if config.addition_embed_type == "text_time" else None
            every += [f"lora_unet_{layer.replace('.', '_')}" for layer in (path, original) if layer]
        else:
            numbers = ("", "1") if network == "text_encoder" else ("2",)
            every += [f"lora_te{number}_{path.replace('.', '_')}" for number in numbers]
        names |= dict.fromkeys((*every, f"{network}.{path}"), name)
    return names


def _scale(name: str, rank: int, alphas: Mapping[str, float], settings: Mapping[str, Any]) -> float:
    """What the product of a layer's factors is multiplied by, told by the tensors or by diffusers' header."""
    network, path = _network(name)
    patterns = settings.get(f"{network}.alpha_pattern") or {}
    own = next((alpha for end, alpha in patterns.items() if f".{path}".endswith(f".{end}")), None)
    alpha = alphas.get(name, settings.get(f"{network}.lora_alpha") if own is None else own)
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if settings.get(f"{network}.use_rslora") else rank)
