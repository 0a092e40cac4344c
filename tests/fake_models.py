"""Models of real sizes without their memory: parameters are fake tensors."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel

from pumice import testbed
from pumice.models import DiffusionModel, load
from real_unets import UNETS


def stable_diffusion_1(dtype: torch.dtype = torch.bfloat16) -> DiffusionModel:
    """Denoiser and autoencoder of Stable Diffusion 1.5, fake; its prompts are encoded by one real layer."""
    tiny = testbed.tiny_pipeline("sd1")
    text = CLIPTextConfig(
        **{**tiny.text_encoder.config.to_dict(), "hidden_size": 768, "num_hidden_layers": 1}
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a fake parameter cannot be converted
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            unet = UNet2DConditionModel(sample_size=64, **UNETS["sd1"])
            vae = AutoencoderKL(
                latent_channels=4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                scaling_factor=0.18215,
            )
    finally:
        torch.set_default_dtype(before)
    parts = {**tiny.components, "unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}
    return load(StableDiffusionPipeline(**parts, requires_safety_checker=False))
