"""Checkpoints of guided diffusion (arXiv:2105.05233) as diffusers' UNet2DModel: one network, other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import UnsupportedModelError
from .loading import one_line_errors

_HEAD = 64  # channels of an attention head in all published ones: shapes do not tell
_GROUPS = 32
_BLOCKS = {
    "conv": ("DownBlock2D", "UpBlock2D"),
    "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
}
_SIZE = 256  # px, of the published unconditional one

Weights = Mapping[str, Tensor]
_Pairs = Iterator[tuple[str, str]]


def load_guided_diffusion(path: Path) -> Any:
    """Open an unconditional checkpoint, a .safetensors file in the names of guided diffusion's UNetModel.

    All but two settings are read off names and shapes. Attention heads have 64 channels, and query, key and
    value follow each other head by head ("legacy" order), as in the published models; what size of pictures
    the model was trained on says an entry "image_size" of the file's metadata, else 256 px.

    Returns:
        A `UNet2DModel` in the file's dtype, on the CPU, in eval mode.

    Raises:
        ValueError: for another kind of file, or one that cannot be read.
        UnsupportedModelError: for a conditional model, or one that a UNet2DModel cannot stand for.
    """
    from diffusers import UNet2DModel

    if path.suffix != ".safetensors":
        raise ValueError(
            f"denoiser: {str(path)!r} is not a .safetensors file; one of torch is converted by "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)"
        )
    with one_line_errors(path, "denoiser"), safe_open(path, framework="pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        said = (file.metadata() or {}).get("image_size", str(_SIZE))
    if not said.isdecimal() or not int(said):
        raise ValueError(f"denoiser: {str(path)!r} says image_size {said!r}, expected a number of pixels")
    config, renamed = converted(weights, path)
    with one_line_errors(path, "denoiser"):
        with torch.device("meta"):
            unet = UNet2DModel(sample_size=int(said), **config)
        unet.load_state_dict(renamed, assign=True)
    return unet.eval()


def converted(weights: Weights, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of a UNet2DModel, and all weights under its names.

    Raises:
        UnsupportedModelError: naming the file, as `load_guided_diffusion`.
    """
    refused = f"denoiser: {str(path)!r}"
    if "label_emb.weight" in weights:
        raise UnsupportedModelError(f"{refused} is of classes, expected an unconditional one")
    try:
        layout = _Layout.of(weights)
        width = weights["time_embed.0.weight"].shape[1]
        if width != layout.channels[0]:
            raise UnsupportedModelError(
                f"{refused} has a first level of {layout.channels[0]} channels and a time embedding of "
                f"{width}, expected one width"
            )
        if any(len(each) % (3 * _HEAD) for key, each in weights.items() if ".qkv." in key):
            raise UnsupportedModelError(f"{refused} has no attention heads of {_HEAD} channels")
        config, renamed = layout.config(weights), dict(_renamed(weights, layout))
    except (KeyError, IndexError) as error:
        raise UnsupportedModelError(f"{refused} is not of guided diffusion, it has no {error}") from error
    splits = sum(".qkv." in key for key in weights)
    if len(renamed) != len(weights) + 2 * splits:
        raise UnsupportedModelError(f"{refused} has more than an unconditional UNet of guided diffusion")
    return config, renamed


@dataclass(frozen=True)
class _Layout:
    """What of a UNetModel its names tell.

    Attributes:
        channels: of each level.
        attention: of each level, whether it has any.
        blocks: ResNet blocks of a level on the way down; one more on the way up.
    """

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    blocks: int

    @classmethod
    def of(cls, weights: Weights) -> _Layout:
        total = sum(f"output_blocks.{n}.0.in_layers.0.weight" in weights for n in range(len(weights)))
        if not total:
            raise KeyError("output_blocks.0.0.in_layers.0.weight")
        # the last block of a level is followed by what enlarges; the last level has none
        period = next((n + 1 for n in range(total) if _upsampler(weights, n)), total)
        starts = range(1, total, period)
        return cls(
            channels=tuple(len(weights[f"input_blocks.{n}.0.out_layers.3.weight"]) for n in starts),
            attention=tuple(f"input_blocks.{n}.1.qkv.weight" in weights for n in starts),
            blocks=period - 1,
        )

    def config(self, weights: Weights) -> dict[str, Any]:
        """Of the UNet2DModel."""
        resnets = "input_blocks.1.0.emb_layers.1.weight"
        kind = "conv" if any(".op." in key for key in weights) else "resnet"
        down, up = _BLOCKS[kind]
        first = weights["input_blocks.0.0.weight"]
        return {
            "in_channels": first.shape[1],
            "out_channels": len(weights["out.2.weight"]),
            "block_out_channels": self.channels,
            "layers_per_block": self.blocks,
            "down_block_types": tuple("AttnDownBlock2D" if each else down for each in self.attention),
            "up_block_types": tuple("AttnUpBlock2D" if each else up for each in reversed(self.attention)),
            "downsample_type": kind,
            "upsample_type": kind,
            "attention_head_dim": _HEAD,
            "norm_num_groups": _GROUPS,
            "attn_norm_num_groups": _GROUPS,
            "resnet_time_scale_shift": (
                "scale_shift" if len(weights[resnets]) == 2 * self.channels[0] else "default"
            ),
        }

    def modules(self, weights: Weights) -> _Pairs:
        """Their names of ResNet blocks, attentions and layers, and those of diffusers."""
        yield "time_embed.0", "time_embedding.linear_1"
        yield "time_embed.2", "time_embedding.linear_2"
        yield "input_blocks.0.0", "conv_in"
        levels, period = len(self.channels), self.blocks + 1
        for level in range(levels):
            for n in range(self.blocks):
                theirs = f"input_blocks.{1 + level * period + n}"
                yield f"{theirs}.0", f"down_blocks.{level}.resnets.{n}"
                if self.attention[level]:
                    yield f"{theirs}.1", f"down_blocks.{level}.attentions.{n}"
            if level < levels - 1:
                theirs, ours = f"input_blocks.{(level + 1) * period}.0", f"down_blocks.{level}.downsamplers.0"
                plain = f"{theirs}.op.weight" in weights
                yield (f"{theirs}.op", f"{ours}.conv") if plain else (theirs, ours)
        for theirs, ours in (("0", "resnets.0"), ("1", "attentions.0"), ("2", "resnets.1")):
            yield f"middle_block.{theirs}", f"mid_block.{ours}"
        for level in range(levels):
            for n in range(period):
                theirs = f"output_blocks.{level * period + n}"
                yield f"{theirs}.0", f"up_blocks.{level}.resnets.{n}"
                if self.attention[levels - 1 - level]:
                    yield f"{theirs}.1", f"up_blocks.{level}.attentions.{n}"
            if level < levels - 1:
                theirs = _upsampler(weights, (level + 1) * period - 1)
                ours = f"up_blocks.{level}.upsamplers.0"
                plain = f"{theirs}.conv.weight" in weights
                yield (f"{theirs}.conv", f"{ours}.conv") if plain else (theirs, ours)
        yield "out.0", "conv_norm_out"
        yield "out.2", "conv_out"


def _upsampler(weights: Weights, block: int) -> str:
    """The name of what enlarges after an output block, empty if nothing does."""
    for n in (1, 2):  # before or after an attention
        theirs = f"output_blocks.{block}.{n}"
        if f"{theirs}.conv.weight" in weights or f"{theirs}.in_layers.0.weight" in weights:
            return theirs
    return ""


def _renamed(weights: Weights, layout: _Layout) -> Iterator[tuple[str, Tensor]]:
    for theirs, ours in layout.modules(weights):
        for end in ("weight", "bias"):
            if f"{theirs}.qkv.{end}" in weights:
                for name, part in _split(weights[f"{theirs}.qkv.{end}"]):
                    yield f"{ours}.{name}.{end}", part
            for layer, name in _layers(theirs, weights):
                weight = weights[f"{theirs}{layer}.{end}"]
                if layer == ".proj_out" and end == "weight":
                    weight = weight.flatten(1)  # (C, C, 1), a linear layer here
                yield f"{ours}{name}.{end}", weight


def _layers(theirs: str, weights: Weights) -> _Pairs:
    """The layers of a module, by both names; the empty name if it is one itself."""
    if f"{theirs}.qkv.weight" in weights:
        yield ".norm", ".group_norm"
        yield ".proj_out", ".to_out.0"
    elif f"{theirs}.in_layers.0.weight" in weights:
        yield ".in_layers.0", ".norm1"
        yield ".in_layers.2", ".conv1"
        yield ".emb_layers.1", ".time_emb_proj"
        yield ".out_layers.0", ".norm2"
        yield ".out_layers.3", ".conv2"
        if f"{theirs}.skip_connection.weight" in weights:
            yield ".skip_connection", ".conv_shortcut"
    else:
        yield "", ""


def _split(qkv: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(heads * 3 * 64, C, 1) or (heads * 3 * 64,) to query, key and value, (C, C) or (C,) each."""
    parts = qkv.unflatten(0, (-1, 3, _HEAD))
    for n, name in enumerate(("to_q", "to_k", "to_v")):
        part = parts[:, n].flatten(0, 1)
        yield name, part if part.ndim == 1 else part[..., 0]
