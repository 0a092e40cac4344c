"""Diffusers pipelines of every family with random weights: small enough to build in milliseconds, offline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

# Words that are one token, as common words are in the real vocabulary; all others fall apart into letters.
_WORDS = (
    "a an the of in on at by and with to is photo picture painting portrait drawing style red green blue "
    "yellow black white small big cat dog horse bird car house tree flower person woman man city sea beach "
    "mountain"
).split()

_CONTEXT = 77


def tiny_pipeline(family: str, seed: int = 0) -> Any:
    """Build a diffusers pipeline with the parts and wiring of `family`, tiny, with random float32 weights.

    Args:
        family: "sd1", "sd2" (v-prediction), "sdxl", "sd3" or "flux". The first three draw 32x32 pictures from
            16x16 latents with DDIM, the last two 16x16 pictures.
        seed: the same seed gives the same weights; the global generator is neither read nor moved.

    Returns:
        The pipeline of the family's own class, in eval mode, its progress bar off.

    Raises:
        ValueError: if the family is not one of the five.
    """
    if family not in _BUILDERS:
        raise ValueError(f"family: got {family!r}, expected one of {', '.join(_BUILDERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _BUILDERS[family]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sd1() -> Any:
    tokenizer = _clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(4, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_clip_config(tokenizer, hidden_size=32)),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=32, attention_head_dim=4),
        scheduler=ddim_scheduler("epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd2() -> Any:
    tokenizer = _clip_tokenizer(pad_token="!")
    return StableDiffusionPipeline(
        vae=_vae(4, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_clip_config(tokenizer, hidden_size=48, hidden_act="gelu")),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=48, attention_head_dim=(2, 4), use_linear_projection=True),
        scheduler=ddim_scheduler("v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    tokenizer, tokenizer_2 = _clip_tokenizer(), _clip_tokenizer(pad_token="!")
    projection_dim, time_dim = 40, 8
    return StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(_clip_config(tokenizer, hidden_size=32)),
        text_encoder_2=CLIPTextModelWithProjection(
            _clip_config(tokenizer_2, hidden_size=48, hidden_act="gelu", projection_dim=projection_dim)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_unet(
            cross_attention_dim=32 + 48,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=time_dim,
            projection_class_embeddings_input_dim=projection_dim + 6 * time_dim,
        ),
        scheduler=ddim_scheduler("epsilon"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _sd3() -> Any:
    tokenizer, tokenizer_2 = _clip_tokenizer(), _clip_tokenizer(pad_token="!")
    sizes = {"hidden_size": 16, "projection_dim": 32}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_vae(4),
        text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer, **sizes)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer_2, **sizes)),
        tokenizer_2=tokenizer_2,
        text_encoder_3=T5EncoderModel(_t5_config()),
        tokenizer_3=_t5_tokenizer(),
    )


def _flux() -> Any:
    tokenizer = _clip_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_flow_vae(1),  # the transformer sees 2x2 patches of the latents as channels
        text_encoder=CLIPTextModel(_clip_config(tokenizer, hidden_size=32)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(_t5_config()),
        tokenizer_2=_t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "sd1": _sd1,
    "sd2": _sd2,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
}


def _unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        **config,
    )


def _vae(latent_channels: int, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=latent_channels,
        sample_size=32,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **config,
    )


def _flow_vae(latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=latent_channels,
        sample_size=16,
        block_out_channels=(8,),
        norm_num_groups=4,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def ddim_scheduler(prediction_type: str) -> DDIMScheduler:
    """The noise schedule that Stable Diffusion 1, 2 and XL share."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _clip_config(tokenizer: CLIPTokenizer, **config: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )


def _clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Byte-level BPE of CLIP's form: all bytes, inside and at the end of a word, and `_WORDS`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in sorted(_WORDS, key=len, reverse=True):  # else "to" would break "photo" apart
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            pieces[:2] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                vocab.append(pieces[0])
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    # transformers 5 ignores vocab_file= and merges_file= without a word, so the tables are passed themselves
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocab)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=_CONTEXT,
    )


def _t5_config() -> T5Config:
    return T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁"] + ["▁" + word for word in _WORDS]
    pieces += [chr(code) for code in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=_CONTEXT)
