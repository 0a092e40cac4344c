"""What the layers of Stable Diffusion 1, 2 and XL are called in the checkpoints of CompVis and Stability AI.

Every function takes a layer by the name it has in diffusers or transformers, and gives None for one that
those models do not have.
"""

from __future__ import annotations

import re
from typing import Any

_BLOCK = r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)"

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TRANSFORMER = re.compile(
    r"norm|proj_in|proj_out"
    r"|transformer_blocks\.\d+\.(norm[123]|attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
)

_VAE_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
_VAE_LAYERS = {
    "resnets": {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
    | {"conv_shortcut": "nin_shortcut"},
    "attentions": {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    "downsamplers": {"conv": "downsample.conv"},
    "upsamplers": {"conv": "upsample.conv"},
}

_CLIP = re.compile(
    r"embeddings\.(?:token|position)_embedding|final_layer_norm"
    r"|encoder\.layers\.(\d+)\.(layer_norm[12]|self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])"
)
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection": "text_projection",
}
_OPEN_CLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
} | {f"self_attn.{name}_proj": f"attn.{name}_proj" for name in ("q", "k", "v", "out")}


def unet_layer(name: str, config: Any) -> str | None:
    """Under `model.diffusion_model.`; `config` is that of the UNet2DConditionModel.

    The original has no blocks but lists of places: at each runs a residual block, then a transformer, then
    what doubles the resolution; what halves it has a place of its own.
    """
    match, layers = re.fullmatch(_BLOCK, name), config.layers_per_block
    if match is None or not isinstance(layers, int):
        return _UNET_ENDS.get(name)
    side, block, kind, layer, rest = match.groups()
    slot, inner = 0, None
    if kind == "resnets":
        inner = _UNET_RESNET.get(rest)
    elif kind == "attentions":
        slot, inner = 1, rest if _TRANSFORMER.fullmatch(rest) else None
    elif kind == "downsamplers" and rest == "conv":
        layer, inner = layers, "op"
    elif kind == "upsamplers" and rest == "conv":
        layer, slot, inner = layers, 1 + config.up_block_types[int(block)].startswith("CrossAttn"), "conv"
    if inner is None:
        return None
    if side == "mid":
        return f"middle_block.{2 * int(layer) + slot}.{inner}"
    place = int(block) * (layers + 1) + int(layer)
    if side == "down":  # conv_in has the first place
        return f"input_blocks.{place + 1}.{slot}.{inner}"
    return f"output_blocks.{place}.{slot}.{inner}"


def vae_layer(name: str, config: Any) -> str | None:
    """Under `first_stage_model.`; `config` is that of the AutoencoderKL."""
    if name in ("quant_conv", "post_quant_conv"):
        return name
    half, _, rest = name.partition(".")
    match = re.fullmatch(_BLOCK, rest)
    if match is None:
        return f"{half}.{_VAE_ENDS[rest]}" if half in ("encoder", "decoder") and rest in _VAE_ENDS else None
    side, block, kind, layer, rest = match.groups()
    inner = _VAE_LAYERS.get(kind, {}).get(rest)
    if inner is None:
        return None
    if side == "mid":
        return f"{half}.mid.{'block' if kind == 'resnets' else 'attn'}_{int(layer) + 1}.{inner}"
    if side == "up":  # counted from the picture inwards, in the decoder as well
        block = len(config.block_out_channels) - 1 - int(block)
    return f"{half}.{side}.{block}.{f'block.{layer}.' if kind == 'resnets' else ''}{inner}"


def clip_layer(name: str) -> str | None:
    """Of OpenAI's CLIP, under `transformer.`; transformers itself has it with and without `text_model.`."""
    name = name.removeprefix("text_model.")
    return f"text_model.{name}" if _CLIP.fullmatch(name) else None


def open_clip_layer(name: str) -> str | None:
    """Of OpenCLIP, under `model.`, but that it has q_proj, k_proj and v_proj as one in_proj."""
    name = name.removeprefix("text_model.")
    match = _CLIP.fullmatch(name)
    if match is None or match[1] is None:
        return _OPEN_CLIP_ENDS.get(name)
    return f"transformer.resblocks.{match[1]}.{_OPEN_CLIP_LAYERS[match[2]]}"
