"""What the end-to-end scripts share: their arguments, the models they run on, their records."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import machine
from pumice import models, testbed
from pumice.models import DiffusionModel


def arguments(
    description: str | None, shapes: Sequence[str] = ("testbed", "sd15")
) -> argparse.ArgumentParser:
    """--device, --shape and --json; read them with `parse`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=shapes, help="default: sd15 on a GPU, else the testbed")
    parser.add_argument("--json", type=Path)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    found = parser.parse_args()
    found.shape = found.shape or ("sd15" if found.device == "cuda" else "testbed")
    return found


def load(
    device: str, shape: str, *, dtype: torch.dtype | None = None, autoencoder: bool = False
) -> DiffusionModel:
    """The testbed; random weights of Stable Diffusion 1.5 ("sd15"), or of half its channels at 128 px, "mid".

    Args:
        dtype: by default float32, and float16 for random weights on a GPU.
        autoencoder: of real size, too; a small one loads faster where nothing uses it.
    """
    if shape == "testbed":
        return models.load(testbed.load(device=device, dtype=dtype or torch.float32))
    dtype = dtype or (torch.float16 if device == "cuda" else torch.float32)
    return models.load(_random(device, dtype, autoencoder, **_SIZES[shape]))


def record(given: argparse.Namespace, parts: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run the parts and print what they found; --json has it after each part, if a later one is stopped."""
    print(machine.line(given.device))
    found: dict[str, Any] = {"machine": machine.describe(given.device), "model": given.shape}
    for name, part in parts.items():
        found[name] = part()
        print(name, json.dumps(found[name], indent=1), flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))
    return found


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of `work`, which ends with something read by the host, so that the device is done."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


_SIZES = {"sd15": {"sample_size": 64, "channels": 64}, "mid": {"sample_size": 16, "channels": 32}}


def _random(
    device: str, dtype: torch.dtype, autoencoder: bool, *, sample_size: int, channels: int
) -> StableDiffusionPipeline:
    tiny = testbed.tiny_pipeline("sd1")
    text = CLIPTextConfig(
        vocab_size=len(tiny.tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=tiny.tokenizer.bos_token_id,
        eos_token_id=tiny.tokenizer.eos_token_id,
        pad_token_id=tiny.tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=sample_size,
            cross_attention_dim=768,
            block_out_channels=tuple(channels * factor for factor in (5, 10, 20, 20)),
        )
        text_encoder = CLIPTextModel(text)
        vae = AutoencoderKL(
            latent_channels=4,
            block_out_channels=(
                tuple(channels * factor for factor in (2, 4, 8, 8)) if autoencoder else (32,) * 4
            ),
            layers_per_block=2 if autoencoder else 1,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    parts = {**tiny.components, "unet": unet, "text_encoder": text_encoder, "vae": vae}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device=device, dtype=dtype)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval()
    return pipe
