"""A whole pipeline in one file, as other programs read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .files import new_file, write_tensors
from .original_layout import clip_layer, open_clip_layer, unet_layer, vae_layer


def save_single_file(pipe: Any, path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write a pipeline as one .safetensors file in the layout of the original checkpoints.

    A1111, ComfyUI and `from_single_file` of diffusers read it. Such a file holds the weights of the UNet, the
    autoencoder and the text encoders and nothing else: readers guess configurations, tokenizers and the noise
    schedule from them, or must be told (`from_single_file(path, config=folder)`; for A1111 a .yaml file
    beside it says that a Stable Diffusion 2 predicts v). The text encoder of Stable Diffusion 2 is written
    with the 23 layers that diffusers keeps; the original has a 24th, and a projection, that nobody uses.

    Memory beside the model: none for contiguous weights on the CPU in their own dtype (but the fused
    projections of OpenCLIP), else up to one copy.

    Args:
        pipe: a StableDiffusionPipeline (1.x, 2.x) or StableDiffusionXLPipeline, or a DiffusionModel of one.
        path: ends in .safetensors; its folder is made.
        dtype: of all weights in the file; default the dtype that each has.

    Raises:
        UnsupportedModelError: for another family, layers that the original does not have, and weights that
            are offloaded, quantised or under a LoRA adapter.
        TypeError: for the path or id of a pipeline, or a dtype that is not floating.
        ValueError: if there is something at `path` already, or it cannot be written.
    """
    from pumice.models import load  # which imports pumice.io

    if isinstance(pipe, str | PathLike):
        raise TypeError(f"pipe: got a {type(pipe).__name__}, expected a loaded pipeline or a DiffusionModel")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: got {dtype!r}, expected a floating torch.dtype")
    weights = dict(_weights(load(pipe)))
    path = new_file(path)
    write_tensors(path, {name: weight.to("cpu", dtype).contiguous() for name, weight in weights.items()}, {})


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    unet, vae = model.unet.config, model.vae.config
    yield from _renamed("model.diffusion_model.", model.unet, lambda name: unet_layer(name, unet))
    for name, weight in _renamed("first_stage_model.", model.vae, lambda name: vae_layer(name, vae)):
        # attention is made of 1x1 convolutions there
        yield name, weight[:, :, None, None] if ".attn_1." in name and weight.ndim == 2 else weight
    if model.family == "stable_diffusion_xl":
        yield from _clip("conditioner.embedders.0.transformer.", model.text_encoders[0])
        yield from _open_clip("conditioner.embedders.1.model.", model.text_encoders[1])
    elif model.text_encoders[0].config.hidden_act == "quick_gelu":  # OpenAI's CLIP, of Stable Diffusion 1
        yield from _clip("cond_stage_model.transformer.", model.text_encoders[0])
    else:
        yield from _open_clip("cond_stage_model.model.", model.text_encoders[0])


def _clip(prefix: str, encoder: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return _renamed(prefix, encoder, clip_layer)


def _open_clip(prefix: str, encoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    weights = dict(_renamed(prefix, encoder, open_clip_layer))
    for name, weight in weights.items():
        if ".q_proj." in name:
            fused = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            yield name.replace(".q_proj.", ".in_proj_"), torch.cat(fused)
        elif name == f"{prefix}text_projection.weight":
            yield f"{prefix}text_projection", weight.T
        elif ".k_proj." not in name and ".v_proj." not in name:
            yield name.replace("positional_embedding.weight", "positional_embedding"), weight


def _renamed(
    prefix: str, part: nn.Module, rename: Callable[[str], str | None]
) -> Iterator[tuple[str, Tensor]]:
    from pumice.models import UnsupportedModelError
    from pumice.models.attention import check_plain

    part = getattr(part, "_orig_mod", part)  # torch.compile wraps it, and would change the names
    for name, layer in part.named_modules():
        if isinstance(layer, nn.Linear) or hasattr(layer, "base_layer"):
            check_plain(f"{type(part).__name__}.{name}", layer)
    for name, weight in part.state_dict().items():
        layer_name, _, kind = name.rpartition(".")
        original = rename(layer_name)
        if original is None or kind not in ("weight", "bias") or weight.is_meta:
            reason = "is offloaded (meta device)" if weight.is_meta else "has no place in the original layout"
            raise UnsupportedModelError(f"{type(part).__name__}.{name}: {reason}")
        yield f"{prefix}{original}.{kind}", weight
